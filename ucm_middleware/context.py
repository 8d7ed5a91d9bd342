"""UserExecutionContext: who a request or connection runs for, their data, and what must be released after."""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from contextvars import Context, ContextVar, Token
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NoReturn, ParamSpec, Protocol, Self, TypeVar

from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import (
    ContextClosedError,
    ContextIsolationError,
    ContextLimitError,
    IdentityConflictError,
    InvalidContextError,
)
from ucm_middleware.ids import MAX_LENGTH, RESERVED_PREFIX, UnifiedIDManager, validate_id
from ucm_middleware.isolation import copy_data
from ucm_middleware.lifetime import (
    HANDLER_GRACE,
    INTERRUPTING,
    CloseReason,
    Lifetime,
    State,
    in_background,
    loop_is_live,
    running_loop,
)
from ucm_middleware.principal import Principal
from ucm_middleware.resources import (
    DEFAULT_RELEASE_TIMEOUT,
    OwnerTask,
    ReleaseFailure,
    Resource,
    async_resource,
    callback_resource,
    closing_resource,
    owner_resource,
    sync_resource,
)
from ucm_middleware.sharing import Root, find_shared

logger = logging.getLogger(__name__)

MAX_DEPTH: Final = 10
"""How deep children may nest below a root context."""

MAX_CHILDREN: Final = 100
"""How many live children one context may have."""

_PACKAGE: Final = __name__.partition(".")[0]

T = TypeVar("T")
P = ParamSpec("P")


class Inside(Protocol):
    """What may stand in the ContextVar in place of a context: something entered inside of one, or of none."""

    @property
    def context(self) -> "UserExecutionContext | None": ...


ambient: ContextVar["UserExecutionContext | Inside | None"] = ContextVar("ucm_middleware_ambient", default=None)
"""The package's one ContextVar: what the running code belongs to."""


def ambient_context() -> "UserExecutionContext | None":
    """The context that this code runs in, open or not; None outside."""
    value = ambient.get()
    return value if value is None or isinstance(value, UserExecutionContext) else value.context


class _Release:
    """Stands in the ContextVar while a resource is released: only that code, and what it starts, may use the
    context.
    """

    __slots__ = ("context",)

    def __init__(self, context: "UserExecutionContext") -> None:
        self.context = context

    def enter(self) -> "Token[UserExecutionContext | Inside | None]":
        return ambient.set(self)

    def leave(self, token: "Token[UserExecutionContext | Inside | None]") -> None:
        ambient.reset(token)

    def is_here(self) -> bool:
        value: object = ambient.get()
        while value is not None and value is not self:
            value = getattr(value, "outer", None)  # a grant that was taken inside of the release
        return value is self


class Connection(Protocol):
    """What is needed of Starlette's HTTPConnection."""

    @property
    def scope(self) -> Any: ...


class ContextHost(Protocol):
    """What a context tells the manager that it lives under."""

    def child_opened(self, child: "UserExecutionContext", operation_name: str) -> None:
        """A child was opened for a part of the work."""
        ...

    def context_closing(self, context: "UserExecutionContext") -> None:
        """The context is no longer live; its resources are about to be released."""
        ...

    def context_closed(self, context: "UserExecutionContext", metadata: Mapping[str, object]) -> None:
        """The teardown is through. ``metadata`` is what the application had added by then."""
        ...

    def bind_context(self, context: "UserExecutionContext", user_id: str) -> None:
        """An anonymous context learned its user."""
        ...

    def end_within(self, context: "UserExecutionContext", seconds: float) -> None:
        """The credentials behind a context hold no longer than that."""
        ...

    ids: UnifiedIDManager

    @property
    def guard(self) -> object:
        """Who decides for that manager."""
        ...

    def require_owner(self, user_id: str, action: str) -> None:
        """Raise CrossUserAccessError when the code that asks may not touch this user's contexts."""
        ...

    def new_environment(self) -> IsolatedEnvironment:
        """A new overlay on the application's configuration."""
        ...


class UserExecutionContext:
    """One user's execution: immutable identity, data of its own, and resources that it releases when it closes.

    Made by the middleware and the manager; by hand with the constructor or ``from_request``. ``agent_context`` and
    ``audit_metadata`` are copied in, so that nothing given to two contexts is shared by them; ``db_session`` is never
    copied, and is closed with the context that it was given to.

    Raises InvalidContextError when an id or the data breaks a rule.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_agent_context",
        "_audit_metadata",
        "_children",
        "_core",
        "_created",
        "_db_session",
        "_depth",
        "_environment",
        "_host",
        "_lifetime",
        "_parent",
        "_parent_request_id",
        "_request_id",
        "_run_id",
        "_thread_id",
        "_user_id",
        "_websocket_client_id",
    )

    _thread_id: str | None
    _run_id: str | None
    _websocket_client_id: str | None
    _parent_request_id: str | None
    _parent: "UserExecutionContext | None"
    _children: "list[UserExecutionContext] | None"
    _agent_context: dict[str, Any] | None
    _audit_metadata: dict[str, Any] | None
    _db_session: Any
    _environment: IsolatedEnvironment | None
    _host: ContextHost | None

    def __init__(
        self,
        *,
        user_id: str,
        thread_id: str,
        run_id: str,
        request_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        user_id = validate_id(user_id, "user_id")
        thread_id = validate_id(thread_id, "thread_id")
        run_id = validate_id(run_id, "run_id")
        request_id = (
            UnifiedIDManager().generate_request_id() if request_id is None else validate_id(request_id, "request_id")
        )
        if websocket_client_id is not None:
            websocket_client_id = validate_id(websocket_client_id, "websocket_client_id")
        self._start(user_id, request_id, "", Lifetime(State.OPEN, _caller()))
        self._thread_id = thread_id
        self._run_id = run_id
        self._websocket_client_id = websocket_client_id
        self._agent_context = copy_data(agent_context, "agent_context")
        self._audit_metadata = copy_data(audit_metadata, "audit_metadata")
        self._take_session(db_session)

    def _start(self, user_id: str, request_id: str, core: str, lifetime: Lifetime) -> None:
        """Fill in what every context has."""
        self._user_id = user_id
        self._request_id = request_id
        self._core = core
        self._thread_id = None
        self._run_id = None
        self._websocket_client_id = None
        self._created = time.time()
        self._depth = 0
        self._parent_request_id = None
        self._parent = None
        self._children = None
        self._agent_context = None
        self._audit_metadata = None
        self._db_session = None
        self._environment = None
        self._host = None
        self._lifetime = lifetime

    @classmethod
    def from_request(
        cls,
        *,
        user_id: str,
        thread_id: str,
        run_id: str,
        request_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """A context from the ids of a request; see the class for what is copied, and for the errors."""
        return cls(
            user_id=user_id,
            thread_id=thread_id,
            run_id=run_id,
            request_id=request_id,
            db_session=db_session,
            websocket_client_id=websocket_client_id,
            agent_context=agent_context,
            audit_metadata=audit_metadata,
        )

    @classmethod
    def from_connection(
        cls,
        connection: Connection,
        *,
        user_id: str,
        db_session: Any = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """A context for a Starlette HTTPConnection, with new ids. Who the user is, the caller says; no header does."""
        ids = UnifiedIDManager()
        thread_id = ids.generate_thread_id()
        is_websocket = connection.scope["type"] == "websocket"
        return cls(
            user_id=user_id,
            thread_id=thread_id,
            run_id=ids.generate_run_id(thread_id),
            websocket_client_id=ids.generate_websocket_client_id() if is_websocket else None,
            db_session=db_session,
            agent_context=agent_context,
            audit_metadata=audit_metadata,
        )

    # Identity. Properties without setters, so that assigning one raises; readable for ever.

    @property
    def user_id(self) -> str:
        return self._user_id

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def thread_id(self) -> str:
        # Ids that were not given derive from the core that the request id was made from: no request pays for ids that
        # it does not read, and two readers cannot see two different ones.
        return self._thread_id or f"thread_{self._core}"

    @property
    def run_id(self) -> str:
        return self._run_id or f"run_{self.thread_id}_{self._core}"

    @property
    def websocket_client_id(self) -> str | None:
        return self._websocket_client_id

    @property
    def created_at(self) -> datetime:
        """When the context was made, aware, in UTC."""
        return datetime.fromtimestamp(self._created, UTC)

    @property
    def operation_depth(self) -> int:
        """0 for a root context, one more for each level of children."""
        return self._depth

    @property
    def parent_request_id(self) -> str | None:
        return self._parent_request_id

    @property
    def is_anonymous(self) -> bool:
        """True while no user is bound: ``user_id`` is then an unguessable id that no other context has."""
        return self._user_id.startswith(RESERVED_PREFIX)

    @property
    def needs_waiting(self) -> bool:
        """True when something must be released or closed with this context, or somebody is closing it already."""
        lifetime = self._lifetime
        return lifetime.has_resources or bool(self._children) or lifetime.state is State.CLOSING

    @property
    def is_open(self) -> bool:
        return self._lifetime.is_open

    # The user's data.

    @property
    def agent_context(self) -> dict[str, Any]:
        """Data of this context alone. Raises ContextClosedError after teardown, when the mapping has been emptied."""
        self.require_usable()
        if self._agent_context is None:
            with Lifetime.transition:  # two threads must not each get a mapping of their own
                self._agent_context = {} if self._agent_context is None else self._agent_context
        return self._agent_context

    @property
    def audit_metadata(self) -> dict[str, Any]:
        """What the application adds to this context's audit records. Raises ContextClosedError after teardown."""
        self.require_usable()
        if self._audit_metadata is None:
            with Lifetime.transition:
                self._audit_metadata = {} if self._audit_metadata is None else self._audit_metadata
        return self._audit_metadata

    @property
    def db_session(self) -> Any:
        """The very object that was given, or None. Raises ContextClosedError after teardown."""
        self.require_usable()
        return self._db_session

    @property
    def environment(self) -> IsolatedEnvironment:
        """Configuration for this context: the application's, overlaid with what is set here and seen nowhere else."""
        self.require_usable()
        if self._environment is None:
            made = IsolatedEnvironment().overlay() if self._host is None else self._host.new_environment()
            with Lifetime.transition:
                self._environment = made if self._environment is None else self._environment
        return self._environment

    # Life.

    def bind(self, user: Principal | str) -> None:
        """Give an anonymous context its user. Once; the same user again changes nothing.

        A principal whose credentials end brings the context's deadline forward to that. Raises IdentityConflictError
        for a second, different user, and when a session, a resource or a child was opened while the context was
        anonymous; ContextLimitError when that user has too many contexts; UnauthenticatedError for expired credentials.
        """
        self.require_usable()
        principal = user if isinstance(user, Principal) else Principal(user)
        seconds_left = principal.seconds_left()
        if self._lifetime.state is not State.UNBOUND:
            if principal.user_id != self._user_id:
                raise IdentityConflictError(
                    "this context already has an identity, and it is another one; open a new context"
                )
            self._end_within(seconds_left)
            return
        if self._db_session is not None or self.needs_waiting:
            raise IdentityConflictError(
                "the context was used as an anonymous one: a session, a resource or a child is open; "
                "bind the identity first"
            )
        if self._host is not None:
            self._host.bind_context(self, principal.user_id)
        else:
            self._become(principal.user_id)
        self._end_within(seconds_left)

    def create_child_context(
        self,
        operation_name: str,
        *,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """A context for a part of this one's work: same user, thread, run and session; a copy of its data; own
        resources.

        It closes with its parent at the latest, and never closes the parent's session. Raises ContextLimitError at
        depth 10 and at 100 live children, ContextClosedError after teardown.
        """
        self.require_usable()
        _check_operation_name(operation_name)
        if self._depth >= MAX_DEPTH:
            raise ContextLimitError("depth", MAX_DEPTH, "children nest too deeply: open siblings instead")
        core = (UnifiedIDManager() if self._host is None else self._host.ids).generate_core()
        child = object.__new__(type(self))
        child._start(self._user_id, f"request_{core}", core, Lifetime(State.OPEN, _caller()))
        child._thread_id, child._run_id = self.thread_id, self.run_id
        child._websocket_client_id = self._websocket_client_id
        child._parent_request_id = self._request_id
        child._parent = self
        child._depth = self._depth + 1
        child._db_session = self._db_session
        child._agent_context = copy_data({**self.agent_context, **(agent_context or {})}, "agent_context")
        child._audit_metadata = copy_data({**self.audit_metadata, **(audit_metadata or {})}, "audit_metadata")
        child._host = self._host
        self._adopt(child)
        if self._host is not None:
            self._host.child_opened(child, operation_name)
        return child

    def verify_isolation(self) -> bool:
        """True when nothing this context holds is another's.

        Raises ContextIsolationError that names what it shares with its parent, and ContextClosedError after teardown.
        """
        self.require_usable()
        roots = self._own_roots()
        if self._parent is not None:
            # As if the parent were another user: a child must not share even with its parent, the session excepted.
            roots += [
                Root(f"{root.owner} (parent)", root.label, root.value)
                for root in self._parent._own_roots()
                if not root.opaque
            ]
        if findings := find_shared(roots):
            raise ContextIsolationError(
                "the context shares mutable data with its parent", [str(finding) for finding in findings]
            )
        return True

    def isolation_roots(self) -> list[Root]:
        """Where the walk over what is reachable from this context and its children begins."""
        roots = self._own_roots()
        for child in tuple(self._children or ()):
            roots += child.isolation_roots()
        return roots

    def _own_roots(self) -> list[Root]:
        owner = self._user_id
        roots = [
            Root(owner, f"{owner}.{name.removeprefix('_')}", value)
            for name, value in (("agent_context", self._agent_context), ("audit_metadata", self._audit_metadata))
            if value
        ]
        roots += [Root(owner, f"{owner}.{name}", value) for name, value in list(self.__dict__.items())]
        if self._db_session is not None:
            roots.append(Root(owner, f"{owner}.db_session", self._db_session, opaque=True))
        roots += [Root(owner, f"{owner}.{name}", target, opaque=True) for name, target in self._lifetime.targets()]
        return roots

    def metadata_given(self) -> dict[str, Any]:
        """A copy of ``audit_metadata``; empty when there is none, also after teardown.

        Never raises, so that no record fails an operation: what cannot be copied is shown as the name of its type.
        """
        return {name: _copied(value) for name, value in list((self._audit_metadata or {}).items())}

    # Resources.

    def enter_context(self, cm: AbstractContextManager[T], *, name: str | None = None) -> T:
        """Enter a context manager and exit it at teardown. ``name`` stands for it in logs and records."""
        self.require_usable()
        value = cm.__enter__()
        self._push(sync_resource(cm, name))
        return value

    async def enter_async_context(
        self,
        cm: AbstractAsyncContextManager[T],
        *,
        owner_task: bool = False,
        name: str | None = None,
        timeout: float = DEFAULT_RELEASE_TIMEOUT,
    ) -> T:
        """Enter an asynchronous context manager and exit it at teardown, within ``timeout`` seconds.

        The exit runs in a task of its own. What must exit in the task that it was entered in (anyio task groups, MCP
        sessions) wants ``owner_task=True``: one task then does both.
        """
        self.require_usable()
        self._lifetime.require_loop()
        if not owner_task:
            value = await cm.__aenter__()
            await self._push_entered(async_resource(cm, name, timeout))
            return value
        owner = OwnerTask(cm)
        resource = owner_resource(owner, cm, name, timeout)
        await self._push_entered(resource)
        try:
            return await owner.entered()
        except asyncio.CancelledError:
            owner.cancel()
            raise
        except BaseException:
            self._lifetime.discard(resource)
            raise

    def callback(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function`` at teardown; awaited when it is asynchronous. At once, when the context is closed
        already.
        """
        self._push(callback_resource(partial(function, *args, **kwargs), DEFAULT_RELEASE_TIMEOUT))

    def closing(self, target: T, *, name: str | None = None, timeout: float = DEFAULT_RELEASE_TIMEOUT) -> T:
        """Call the object's ``aclose()``, or else ``close()``, at teardown. Returns the object.

        When the context is closed already, the object is closed at once, and ContextClosedError raised.
        """
        self._push(closing_resource(target, name, timeout))
        return target

    def close(self, reason: CloseReason = "closed", error: BaseException | None = None) -> None:
        """Close from synchronous code, in any thread. Never raises what a resource raises: it is logged and recorded.

        Asynchronous resources are released on the event loop that they were opened on, after this returns.
        ``error`` is what resources see as the reason for their exit; after anything but an ordinary end they see one.
        """
        lifetime = self._lifetime
        begun = lifetime.begin_closing(reason)
        if begun:
            self._announce(reason)
        if self._waits_for_handler():
            if begun:
                self._tear_down_after_handler()
        elif lifetime.claim_teardown():
            self._tear_down_at_home(error)

    async def aclose(
        self, reason: CloseReason = "closed", error: BaseException | None = None
    ) -> tuple[ReleaseFailure, ...]:
        """Close, and wait until every resource is released or reported. Returns the failures.

        A cancellation that arrives meanwhile is raised at the end. When something else is closing the context already,
        waits for that.
        """
        lifetime = self._lifetime
        begun = lifetime.begin_closing(reason)
        if begun:
            self._announce(reason)
        if self._waits_for_handler():
            if begun:
                self._tear_down_after_handler()
            await lifetime.wait_closed()
        elif not lifetime.claim_teardown():
            await lifetime.wait_closed()
        elif lifetime.loop is None or lifetime.loop is asyncio.get_running_loop():
            await self._tear_down(error)
        else:
            self._tear_down_at_home(error)
            await lifetime.wait_closed()
        return lifetime.failures

    def require_usable(self) -> None:
        """Raise ContextClosedError after teardown, and after the deadline even when nothing has noticed it yet."""
        if not self._lifetime.permits_use:
            raise self._closed_error()

    # Views.

    def to_dict(self) -> dict[str, Any]:
        """Identity and metadata as plain values, and the names of what ``agent_context`` holds. Never its values."""
        return {
            "user_id": self._user_id,
            "thread_id": self.thread_id,
            "run_id": self.run_id,
            "request_id": self._request_id,
            "websocket_client_id": self._websocket_client_id,
            "created_at": self.created_at.isoformat(),
            "operation_depth": self._depth,
            "parent_request_id": self._parent_request_id,
            "is_anonymous": self.is_anonymous,
            "state": self._lifetime.state.value,
            "has_db_session": self._db_session is not None,
            "agent_context_keys": sorted(map(str, self._agent_context or ())),
            "audit_metadata": self.metadata_given(),
        }

    def get_audit_trail(self) -> dict[str, Any]:
        """What an auditor asks of one context: its identity, age in seconds, and the application's metadata."""
        shown = self.to_dict()
        del shown["agent_context_keys"]
        return {**shown.pop("audit_metadata"), **shown, "context_age_seconds": time.time() - self._created}

    def __reduce__(self) -> NoReturn:
        # Also what copy and deepcopy ask: a copy would be a second live context that nothing closes.
        raise TypeError("a UserExecutionContext is not copied or pickled; use create_child_context(), or pass its ids")

    def __repr__(self) -> str:
        return f"<UserExecutionContext {self._user_id!r} {self._request_id} {self._lifetime.state.value}>"

    # For the manager and the middleware.

    @classmethod
    def _open(
        cls,
        host: ContextHost,
        user_id: str,
        request_id: str,
        core: str,
        lifetime: Lifetime,
        websocket_client_id: str | None,
    ) -> Self:
        """A context without data, from ids that are already checked: the short way, on the path of each request."""
        context = object.__new__(cls)
        context._start(user_id, request_id, core, lifetime)
        context._websocket_client_id = websocket_client_id
        context._host = host
        return context

    @property
    def lifetime(self) -> Lifetime:
        """The state machine behind this context."""
        return self._lifetime

    @property
    def host(self) -> ContextHost | None:
        """The manager that this context lives under."""
        return self._host

    def _attach(self, host: ContextHost) -> bool:
        """Put the context under a manager. False when it is under another one."""
        if self._host is None:
            self._host = host
        return self._host is host

    def _detach(self) -> None:
        """Undo ``_attach``: the manager refused the context."""
        self._host = None

    def _become(self, user_id: str) -> bool:
        """The transition from unbound to open. False when it was made already, or the teardown has begun."""
        if not self._lifetime.bind():
            return False
        self._user_id = user_id
        return True

    # Inside.

    def _end_within(self, seconds: float | None) -> None:
        """Let the context outlive no credentials that end."""
        if seconds is None:
            return
        if self._host is not None:
            self._host.end_within(self, seconds)
        else:
            self._lifetime.limit(time.monotonic() + seconds, time.monotonic)

    def _adopt(self, child: "UserExecutionContext") -> None:
        """Take a child in; refuses when the teardown has begun, so that no child outlives it."""
        with Lifetime.transition:
            children = self._children
            if children is None:
                children = self._children = []
            full = len(children) >= MAX_CHILDREN
            if not full:
                children.append(child)
            if not full and self.is_open:
                return
            self._forget(child)
        if full:
            raise ContextLimitError("children", MAX_CHILDREN, "close the children that are done")
        raise self._closed_error()

    def _closed_error(self) -> ContextClosedError:
        lifetime = self._lifetime
        return ContextClosedError(self._request_id, lifetime.where(), lifetime.reason or "expired")

    def _take_session(self, session: Any) -> None:
        self._db_session = session
        if session is not None and (hasattr(session, "aclose") or hasattr(session, "close")):
            self._lifetime.add(closing_resource(session, "db_session", DEFAULT_RELEASE_TIMEOUT))

    def _push(self, resource: Resource) -> None:
        """Keep a resource that is already open; when the context is not open any more, let go of it and refuse."""
        if not self._lifetime.permits_use or not self._lifetime.add(resource):
            error = self._closed_error()
            self._lifetime.release_late_here(resource, error)
            raise error

    async def _push_entered(self, resource: Resource) -> None:
        """The same for what was entered asynchronously, meanwhile."""
        if not self._lifetime.add(resource):
            error = self._closed_error()
            await self._lifetime.release_late(resource, error)
            raise error

    def _announce(self, reason: CloseReason) -> None:
        if self._host is not None:
            self._host.context_closing(self)
        self._lifetime.releasing = _Release(self)
        if reason in INTERRUPTING:
            self._lifetime.interrupt()
        self._lifetime.offer_teardown()

    def _seen_error(self, error: BaseException | None) -> BaseException | None:
        """What resources see: a transaction must not be committed because its request was cut off."""
        lifetime = self._lifetime
        if error is None and lifetime.reason not in ("finished", "closed", "cleared"):
            return self._closed_error()
        return error

    def _waits_for_handler(self) -> bool:
        """Whether a handler must end first: not when it is the one that closes, in whichever of its tasks and
        threads.
        """
        lifetime = self._lifetime
        return lifetime.handler_runs_elsewhere and (lifetime.reason in INTERRUPTING or not self._is_ambient())

    def _is_ambient(self) -> bool:
        context = ambient_context()
        while context is not None and context is not self:
            context = context._parent
        return context is self

    def _tear_down_after_handler(self) -> None:
        """Leave the teardown to the task that runs the handler, for when it has ended.

        What the handler opened itself stands above the resources here and must be undone first: a connection that went
        back to its pool now would be another user's while this handler still rolls back on it.
        """
        loop = self._lifetime.loop
        if loop is None or not loop_is_live(loop):
            self._tear_down_overdue()
            return
        try:
            loop.call_soon_threadsafe(self._wait_for_handler, loop)
        except RuntimeError:  # the loop was closed in this very moment
            self._tear_down_overdue()

    def _wait_for_handler(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._lifetime.state is State.CLOSING:
            # In an empty Context: a timer keeps its own until it is due, cancelled or not, and all that is in there.
            timer = loop.call_later(HANDLER_GRACE, self._tear_down_overdue, context=Context())
            self._lifetime.overdue = timer

    def _tear_down_overdue(self) -> None:
        if self._lifetime.claim_teardown():
            logger.warning("the handler of %s did not end when its context closed: its resources are released", self)
            self._tear_down_at_home(None)

    def _tear_down_at_home(self, error: BaseException | None) -> None:
        """The teardown on the context's event loop, when it is live; else here, as far as it goes."""
        home = self._lifetime.loop
        here = running_loop()
        if home is None or home is here:
            self._tear_down_here(here, error)
            return
        if loop_is_live(home):
            with suppress(RuntimeError):  # the loop was closed in this very moment
                home.call_soon_threadsafe(self._tear_down_here, home, error)
                return
        self._tear_down_here(None, error)

    def _tear_down_here(self, loop: asyncio.AbstractEventLoop | None, error: BaseException | None) -> None:
        """The teardown, as far as it goes without waiting; the rest in a task on ``loop``, or reported without one."""
        error = self._seen_error(error)
        children = tuple(self._children or ())
        for child in reversed(children):
            child.close(self._lifetime.reason or "closed", error)
        waits = any(child.lifetime.state is not State.CLOSED for child in children)
        if loop is not None and (waits or not self._lifetime.release_here(error)):
            in_background(loop, self._tear_down(error))
            return
        self._lifetime.abandon(error)
        self._finish()

    async def _tear_down(self, error: BaseException | None) -> None:
        error = self._seen_error(error)
        lifetime = self._lifetime
        cancelled: asyncio.CancelledError | None = None
        try:
            for child in reversed(tuple(self._children or ())):
                try:
                    await child.aclose(lifetime.reason or "closed", error)
                except asyncio.CancelledError as raised:
                    cancelled = raised
            if not lifetime.release_here(error):
                await lifetime.release(error)
        finally:
            self._finish()
        if cancelled is not None:
            raise cancelled

    def _forget(self, child: "UserExecutionContext") -> None:
        with Lifetime.transition:
            if self._children and child in self._children:
                self._children.remove(child)

    def _finish(self) -> None:
        """Wipe the data, let go of everything that could keep this context alive, and say so."""
        metadata = self.metadata_given()
        for data in (self._agent_context, self._audit_metadata):
            if data:
                data.clear()
        if self._environment is not None:
            self._environment.clear()
        for name in list(self.__dict__):
            if not hasattr(type(self), name):  # what shadows a method is a test's mock, which takes itself away
                del self.__dict__[name]
        self._db_session = self._environment = self._children = None
        parent, self._parent = self._parent, None
        if parent is not None:
            parent._forget(self)
        host, self._host = self._host, None
        self._lifetime.finish_closing()
        if host is not None:
            host.context_closed(self, metadata)
        stop, self._lifetime.stop = self._lifetime.stop, None
        if stop is not None:
            raise stop


def _check_operation_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_LENGTH or not name.isprintable():
        rule = f"is not text, blank, longer than {MAX_LENGTH} characters or not printable"
        raise InvalidContextError("operation_name", rule, "name what the child does, such as 'search'")


def _copied(value: object) -> object:
    try:
        return copy_data({"value": value}, "audit_metadata")["value"]
    except InvalidContextError:
        return f"<{type(value).__name__}>"


def _caller() -> str | tuple[str, int]:
    """The file and line that the package was called from."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return ("?", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
