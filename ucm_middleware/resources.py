"""What a context can hold: one resource of each kind, and how it is let go of."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Literal, TypeVar, cast

from ucm_middleware.errors import ConfigurationError

T = TypeVar("T")

DEFAULT_RELEASE_TIMEOUT: Final = 10.0
"""Seconds one asynchronous resource may take to let go, unless it was entered with a timeout of its own."""


ReleaseOutcome = Literal["failed", "timed out", "cancelled", "unclosed"]


@dataclass(frozen=True, slots=True)
class ReleaseFailure:
    """A resource that was entered and not cleanly exited.

    ``outcome`` is "failed" (it raised), "timed out", "cancelled" (the event loop itself was torn down) or "unclosed"
    (there was no live event loop to close it on).
    """

    name: str
    outcome: ReleaseOutcome
    error: Exception

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome} ({type(self.error).__name__})"


@dataclass(slots=True, eq=False)
class Resource:
    """One thing to let go of. ``target`` is the object by which a replacing context can take it over,
    ``owner`` the task that the exit runs in, when it has one of its own. What is ``of_plugin`` wraps the work of the
    context, and is no use of it. ``on_record`` says that its entering is."""

    name: str
    target: object
    release: Callable[[BaseException | None], object]
    timeout: float
    is_async: bool
    owner: "asyncio.Task[Any] | None" = None
    of_plugin: bool = False
    on_record: bool = False


_WAYS: Final = {
    "__enter__": "a synchronous context manager: context.enter_context(...)",
    "__aenter__": "an asynchronous context manager: await context.enter_async_context(...)",
}
_NO_WAY: Final = "no context manager; give what only closes to context.closing(...)"


def require_entry(cm: object, method: Literal["__enter__", "__aenter__"]) -> None:
    """Raise ConfigurationError for what is not entered by this method; it says how it is."""
    if not hasattr(cm, method):
        way = next((way for other, way in _WAYS.items() if hasattr(cm, other)), _NO_WAY)
        raise ConfigurationError(f"{name_of(cm)} is {way}")


def sync_resource(cm: AbstractContextManager[Any], name: str | None) -> Resource:
    """The exit of an entered synchronous context manager."""
    return Resource(
        name or name_of(cm), cm, lambda error: cm.__exit__(*_exc_info(error)), DEFAULT_RELEASE_TIMEOUT, False
    )


def async_resource(cm: AbstractAsyncContextManager[Any], name: str | None, timeout: float) -> Resource:
    """The exit of an entered asynchronous context manager."""
    return Resource(name or name_of(cm), cm, lambda error: cm.__aexit__(*_exc_info(error)), timeout, True)


def plugin_resource(cm: AbstractAsyncContextManager[Any], name: str, blame: Callable[[Exception], None]) -> Resource:
    """The exit of what a plugin wraps something with. ``blame`` notes on an error of the exit's own whose it is."""

    async def leave(error: BaseException | None) -> None:
        try:
            await cm.__aexit__(*_exc_info(error))
        except Exception as raised:
            if raised is not error:
                blame(raised)
            raise

    return Resource(name, cm, leave, DEFAULT_RELEASE_TIMEOUT, True, of_plugin=True)


def callback_resource(call: partial[object], timeout: float) -> Resource:
    """A function to call at teardown with its arguments; awaited when it is, or returns, an awaitable."""
    return Resource(name_of(call), call, lambda error: call(), timeout, inspect.iscoroutinefunction(call.func))


def closing_resource(target: object, name: str | None, timeout: float) -> Resource:
    """An object with ``aclose`` or ``close``; the first of the two that it has is called."""
    aclose = getattr(target, "aclose", None)
    close = aclose if callable(aclose) else getattr(target, "close", None)
    if not callable(close):
        raise ConfigurationError(
            f"{name_of(target)} has neither close() nor aclose(); register a callback that releases it instead"
        )
    function = cast("Callable[[], object]", close)
    is_async = close is aclose or inspect.iscoroutinefunction(close)
    return Resource(name or name_of(target), target, lambda error: function(), timeout, is_async)


class OwnerTask(Generic[T]):
    """Enters and exits one asynchronous context manager in one task, for those that must not change tasks.

    anyio task groups and cancel scopes, MCP sessions and generators that reset ContextVar tokens are such. A
    cancellation of the owner, by the resource's own scope or because the event loop ends, makes it exit at once, not
    in its turn. ``mark_release`` is called in the task before the exit, so that it may use the context that is closing;
    ``say_entered`` once the entering is through.
    """

    __slots__ = ("_cm", "_entered", "_error", "_leave", "_mark_release", "task")

    def __init__(
        self, cm: AbstractAsyncContextManager[T], mark_release: Callable[[], None], say_entered: Callable[[], None]
    ) -> None:
        self._cm = cm
        self._mark_release = mark_release
        loop = asyncio.get_running_loop()
        self._entered: asyncio.Future[T] = loop.create_future()
        self._leave = asyncio.Event()
        self._error: BaseException | None = None
        self.task = asyncio.Task(self._own(say_entered), loop=loop, name=f"owner of {name_of(cm)}")

    async def entered(self) -> T:
        """The value of the context manager, once its entering is through."""
        await asyncio.wait((self.task, self._entered), return_when=asyncio.FIRST_COMPLETED)
        if not self._entered.done():
            await self.task  # raises what the entering raised
        return self._entered.result()

    async def exit(self, error: BaseException | None) -> None:
        """Ask the owner to leave, and wait until it has. An entering that is still under way is cancelled."""
        self._error = error
        self._leave.set()
        if not self._entered.done():
            self.task.cancel()
        try:
            await asyncio.wait((self.task,))
        except asyncio.CancelledError:
            self.task.cancel()
            await asyncio.wait((self.task,))
            if not self.task.cancelled():
                self.task.exception()  # seen: the release is on record as out of time
            raise
        if not self.task.cancelled() and (raised := self.task.exception()) is not None and not is_only(raised, error):
            raise raised

    async def _own(self, say_entered: Callable[[], None]) -> None:
        value = await self._cm.__aenter__()
        say_entered()
        self._entered.set_result(value)
        del value, say_entered
        try:
            await self._leave.wait()
        except asyncio.CancelledError as cancelled:  # the event loop itself is being torn down
            await self._exit(cancelled)
            raise
        await self._exit(self._error)

    async def _exit(self, error: BaseException | None) -> None:
        self._mark_release()  # to the end of this task, whose Context is its own
        await self._cm.__aexit__(*_exc_info(error))

    def cancel(self) -> None:
        """Stop an entering that nobody waits for any more."""
        self.task.cancel()


def owner_resource(owner: OwnerTask[Any], cm: object, name: str | None, timeout: float) -> Resource:
    """The exit of a context manager that has a task of its own."""
    return Resource(name or name_of(cm), cm, owner.exit, timeout, True, owner.task)


def is_only(raised: BaseException, error: BaseException | None) -> bool:
    """Whether what an exit raised is the very error it was given: alone, or in the groups that task groups make of
    it.
    """
    if isinstance(raised, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", raised)
        return error is not None and all(is_only(inner, error) for inner in group.exceptions)
    return raised is error


def awaiting(resource: Resource, awaitable: Awaitable[object]) -> Resource:
    """The rest of a release that turned out to be asynchronous when it was called."""
    return Resource(
        resource.name, awaitable, lambda error: awaitable, resource.timeout, True, on_record=resource.on_record
    )


def _exc_info(error: BaseException | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def name_of(target: object) -> str:
    # The generator behind @contextmanager and the function behind partial() say more than their wrappers.
    inner = getattr(target, "gen", None) or getattr(target, "func", target)
    named = getattr(inner, "__qualname__", None)
    return named if isinstance(named, str) else type(target).__qualname__
