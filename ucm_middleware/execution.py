"""The module functions: a context by hand, a check of one, and running code in one."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextvars import Context
from types import TracebackType
from typing import Any

from ucm_middleware.ambient import Ambient, ambient_grant, enter, leave
from ucm_middleware.census.census import Census, references
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.errors import ContextClosedError, CrossUserAccessError, InvalidContextError
from ucm_middleware.ids import UnifiedIDManager
from ucm_middleware.lifetime import CloseReason

logger = logging.getLogger(__name__)


def create_isolated_execution_context(
    user_id: str,
    request_id: str | None = None,
    *,
    thread_id: str | None = None,
    run_id: str | None = None,
    db_session: Any = None,
    websocket_client_id: str | None = None,
    agent_context: Mapping[str, Any] | None = None,
    audit_metadata: Mapping[str, Any] | None = None,
) -> UserExecutionContext:
    """A context under no manager, with ids made for those not given. Raises InvalidContextError."""
    ids = UnifiedIDManager()
    thread_id = ids.generate_thread_id() if thread_id is None else thread_id
    return UserExecutionContext(
        user_id=user_id,
        thread_id=thread_id,
        run_id=ids.generate_run_id(thread_id) if run_id is None else run_id,
        request_id=request_id,
        db_session=db_session,
        websocket_client_id=websocket_client_id,
        agent_context=agent_context,
        audit_metadata=audit_metadata,
    )


def validate_user_context(context: object) -> UserExecutionContext:
    """The same object, when it is a live context. Raises InvalidContextError and ContextClosedError when it is not."""
    if not isinstance(context, UserExecutionContext):
        raise InvalidContextError(
            "context",
            f"is a {type(context).__name__}, not a UserExecutionContext",
            "give one, such as current_context()",
        )
    context.require_usable()
    if not context.is_open:  # its own releases may still use it, and no more
        raise context._closed_error()
    return context


class managed_user_context:  # noqa: N801 - used like the functions of contextlib
    """``async with managed_user_context(context):`` or ``with``: runs the block in the context, and closes it after.

    When the block ends well and a resource does not, raises an ExceptionGroup of what the resources raised; an error of
    the block itself goes first, with a note. A block of ``async with`` whose context expires is cancelled, and ends in
    ContextClosedError. Entering another user's context from inside a user's context raises
    CrossUserAccessError outside of a ``privileged`` block.
    """

    __slots__ = ("_context", "_leave_span", "_references", "_token")

    def __init__(self, context: UserExecutionContext) -> None:
        self._context = validate_user_context(context)
        self._token: Ambient | None = None
        self._leave_span: Callable[[], None] | None = None
        self._references = 0

    def __enter__(self) -> UserExecutionContext:
        require_entry(self._context)
        self._references = references(self._context)
        self._token = enter(self._context)
        host = self._context.host
        if host is not None and (spans := host.telemetry.spans) is not None:
            self._leave_span = spans.enter(self._context)
        return self._context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        census, before = self._census(), references(self._context)
        try:
            self._context.close(reason_of(error), error)
        finally:
            let_go = before - references(self._context)
            self._leave()
            is_held = census is not None and self._is_held(let_go)
            if census is not None and is_held:
                census.suspect(self._context, None)
        self._raise_failures(error)
        if census is not None and is_held and error is None:
            census.require_nothing(self._context)

    async def __aenter__(self) -> UserExecutionContext:
        context = self.__enter__()
        context.lifetime.run_in_current_task()
        return context

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lifetime = self._context.lifetime
        lifetime.task = None
        interrupted = lifetime.absorb_interrupt(error)
        census, before = self._census(), references(self._context)
        try:
            await self._context.aclose(reason_of(error), error)
        finally:
            let_go = before - references(self._context)
            self._leave()
            is_held = census is not None and self._is_held(let_go)
            if census is not None and is_held:
                census.suspect(self._context, None)
        if interrupted and isinstance(error, asyncio.CancelledError):
            raise ContextClosedError(self._context.request_id, lifetime.where(), lifetime.reason or "closed") from error
        self._raise_failures(error)
        if census is not None and is_held and error is None:
            census.require_nothing(self._context)

    def _census(self) -> Census | None:
        host = self._context.host  # a closed context has none
        return None if host is None else host.census

    def _is_held(self, let_go: int) -> bool:
        """Whether there are more references to the context than before the block, but for those that the close
        ``let_go``. Inside of the block that does not show: its Context shares the reference with those of its tasks.
        """
        return references(self._context) > self._references - let_go

    def _leave(self) -> None:
        token, self._token = self._token, None
        if token is not None:
            leave(token)
        leave_span, self._leave_span = self._leave_span, None
        if leave_span is not None:
            leave_span()

    def _raise_failures(self, error: BaseException | None) -> None:
        failures = self._context.lifetime.failures
        if not failures:
            return
        text = f"{len(failures)} resources of context {self._context.request_id} were not released"
        if error is None:
            raise ExceptionGroup(text, [failure.error for failure in failures])
        error.add_note(f"{text}: {', '.join(map(str, failures))}")


def variables_here(context: UserExecutionContext) -> Context | None:
    """The Context of the context's request, when this code runs in it: what sets a ContextVar on entering can then
    reset it on leaving.
    """
    variables = context.lifetime.variables
    # On another loop the releases could not run in it: the request's own may be in there at that moment.
    if variables is not None and context.lifetime.loop is asyncio.get_running_loop():
        try:
            variables.run(bool)
        except RuntimeError:  # it is entered, and cannot be twice
            return variables
    return None


def reason_of(error: BaseException | None) -> CloseReason:
    """In a word why a block ended."""
    if error is None:
        return "finished"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"


def require_entry(context: UserExecutionContext) -> None:
    """Raise CrossUserAccessError in another user's context."""
    ambient = ambient_context()
    host = context.host or (None if ambient is None else ambient.host)
    if host is not None:
        host.require_owner(context.user_id, "managed_user_context")
    elif ambient is not None and ambient.user_id != context.user_id:
        grant = ambient_grant()
        if grant is None or not grant.covers(context.user_id):
            raise CrossUserAccessError("managed_user_context: this code runs in another user's context")
