"""Calling the hooks: one tuple of implementations for each, empty when no plugin has any.

So a call costs nothing that is not asked for: ``if hooks.identify: await hooks.identify(connection)``. pluggy would
return coroutines un-awaited, and walks its lists anew at each call.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING, Any, Generic, Self, TypeGuard, TypeVarTuple, cast

from ucm_middleware.errors import PluginError
from ucm_middleware.principal import Principal

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ucm_middleware.agents.run import AgentRun
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.lifetime import CloseReason
    from ucm_middleware.transactions import IsolationLevel, Transaction
    from ucm_middleware.types import Message

logger = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

AsyncCM = AbstractAsyncContextManager[object]


@dataclass(slots=True, eq=False)
class Source:
    """Where a plugin comes from: its name, its module, and its distribution with the version.

    The distribution of a plugin that was given as an object is looked up when an error must name it.
    """

    plugin: str
    module: str
    distribution: str | None = None

    def error(self, problem: str, remedy: str) -> PluginError:
        """The error that names this plugin."""
        self._look_up()
        return PluginError(self.plugin, self.distribution, problem, remedy)

    def __str__(self) -> str:
        self._look_up()
        return f"plugin {self.plugin!r} ({self.distribution or 'of no distribution'})"

    def _look_up(self) -> None:
        if self.distribution is None:
            names = packages_distributions().get(self.module.partition(".")[0], ())
            self.distribution = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(names))


@dataclass(frozen=True, slots=True, eq=False)
class Implementation:
    """One plugin's function for one hook. ``call`` takes the hook's arguments, all of them, in order."""

    hook: str
    source: Source
    call: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.hook} of {self.source.plugin}"

    def blame(self, error: Exception) -> None:
        """Note on an error that goes its way whose it is."""
        note = f"raised by {self.hook} of {self.source}"
        if note not in getattr(error, "__notes__", ()):  # one object may be raised for each request
            error.add_note(note)

    def wrong(self, found: object, expected: str) -> PluginError:
        """The error for a result of the wrong kind. Of the result only the type is told: it may be a secret."""
        if inspect.iscoroutine(found):
            found.close()  # so that nothing complains of a coroutine never awaited
        return self.source.error(f"{self.hook} returned a {type(found).__name__}", f"it returns {expected}")


Wrapping = tuple[Implementation, AsyncCM]
"""What a plugin wraps something with, and whose it is."""


class Identify(tuple[Implementation, ...]):
    """``ucm_identify``: the first implementation that knows the user decides."""

    __slots__ = ()

    async def __call__(self, connection: "HTTPConnection") -> Principal | str | None:
        for implementation in self:
            try:
                found = implementation.call(connection)
                if inspect.isawaitable(found):
                    found = await found
            except Exception as error:
                implementation.blame(error)
                raise
            if isinstance(found, Principal | str):
                return found
            if found is not None:
                raise implementation.wrong(found, "a Principal, a user id as text, or None")
        return None


class DeriveKey(tuple[Implementation, ...]):
    """``ucm_derive_key``: the first key decides."""

    __slots__ = ()

    def __call__(self, context: "UserExecutionContext", kind: str, client_id: str) -> str | None:
        for implementation in self:
            found = _called(implementation, context, kind, client_id)
            if isinstance(found, str) and found and found.isprintable():
                return str.__str__(found)
            if found is not None:
                raise implementation.wrong(found, "a key as text that is printable and not empty, or None")
        return None


class OpenTransaction(tuple[Implementation, ...]):
    """``ucm_open_transaction``: the first transaction decides."""

    __slots__ = ()

    def __call__(
        self, context: "UserExecutionContext", isolation_level: "IsolationLevel | None"
    ) -> "Transaction | None":
        for implementation in self:
            found = _called(implementation, context, isolation_level)
            if _is_transaction(found):
                return found
            if found is not None:
                raise implementation.wrong(found, "a Transaction, with session, execute() and end(), or None")
        return None


class RunAgent(tuple[Implementation, ...]):
    """``ucm_run_agent``: the first that knows the agent runs it."""

    __slots__ = ()

    def __call__(self, run: "AgentRun", agent: object, parameters: Mapping[str, Any]) -> Awaitable[object] | None:
        for implementation in self:
            found = _called(implementation, run, agent, parameters)
            if inspect.isawaitable(found):
                return found
            if found is not None:
                raise implementation.wrong(found, "an awaitable, or None for an agent of another framework")
        return None


class StreamAgent(tuple[Implementation, ...]):
    """``ucm_stream_agent``: the first that knows the agent drives it."""

    __slots__ = ()

    def __call__(self, run: "AgentRun", agent: object, parameters: Mapping[str, Any]) -> AsyncIterable[object] | None:
        for implementation in self:
            found = _called(implementation, run, agent, parameters)
            if isinstance(found, AsyncIterable):
                return cast("AsyncIterable[object]", found)
            if found is not None:
                raise implementation.wrong(found, "an asynchronous iterable, or None for another framework's agent")
        return None


class Around(tuple[Implementation, ...], Generic[*Ts]):
    """The hooks that wrap. Gives what to enter, the outermost first, and whose each is."""

    __slots__ = ()

    def __call__(self, *args: *Ts) -> list[Wrapping]:
        found: list[Wrapping] = []
        for implementation in self:
            cm = _called(implementation, *args)
            if _is_async_cm(cm):
                found.append((implementation, cm))
            elif cm is not None:
                raise implementation.wrong(cm, "an asynchronous context manager, or None to stay out")
        return found


class BindSession(tuple[Implementation, ...]):
    """``ucm_bind_session``: all of them, or the error of the first that fails."""

    __slots__ = ()

    def __call__(self, context: "UserExecutionContext", session: Any) -> None:
        for implementation in self:
            found = _called(implementation, context, session)
            if found is not None:
                raise implementation.wrong(found, "None, at once, and raises an error to refuse the session")


class NamedTypes(tuple[Implementation, ...]):
    """``ucm_shared_types`` and ``ucm_owned_types``: those of all of them."""

    __slots__ = ()

    def __call__(self) -> list[type]:
        types: list[type] = []
        for implementation in self:
            found = _called(implementation)
            if not isinstance(found, Iterable):
                raise implementation.wrong(found, "an iterable of classes")
            for one in cast("Iterable[object]", found):
                if not isinstance(one, type):
                    raise implementation.wrong(one, "an iterable of nothing but classes")
                types.append(one)
        return types


class Notify(tuple[Implementation, ...], Generic[*Ts]):
    """The hooks that are told. What one of them raises is logged: it concerns neither the others nor the request."""

    __slots__ = ()

    def __call__(self, *args: *Ts) -> None:
        for implementation in self:
            try:
                found = implementation.call(*args)
                if inspect.isawaitable(found):
                    raise implementation.wrong(found, "None, at once")
            except (Exception, asyncio.CancelledError):
                logger.exception("%s of %s failed", implementation.hook, implementation.source)


@dataclass(frozen=True, slots=True, eq=False)
class Hooks:
    """What the plugins of one manager implement. Each field is false when none implements that hook."""

    identify: Identify
    derive_key: DeriveKey
    open_transaction: OpenTransaction
    run_agent: RunAgent
    stream_agent: StreamAgent
    around_context: "Around[UserExecutionContext]"
    around_message: "Around[UserExecutionContext, Message]"
    around_resource: "Around[UserExecutionContext, str]"
    around_agent_run: "Around[UserExecutionContext, str, Any]"
    bind_session: BindSession
    shared_types: NamedTypes
    owned_types: NamedTypes
    context_opened: "Notify[UserExecutionContext]"
    context_bound: "Notify[UserExecutionContext, str]"
    context_closed: "Notify[UserExecutionContext, CloseReason]"
    user_revoked: "Notify[str, str]"
    access_denied: "Notify[str | None, str]"

    @classmethod
    def of(cls, found: Mapping[str, tuple[Implementation, ...]]) -> Self:
        """From the implementations of each hook, by its name, in the order of their calls."""
        return cls(
            identify=Identify(found.get("ucm_identify", ())),
            derive_key=DeriveKey(found.get("ucm_derive_key", ())),
            open_transaction=OpenTransaction(found.get("ucm_open_transaction", ())),
            run_agent=RunAgent(found.get("ucm_run_agent", ())),
            stream_agent=StreamAgent(found.get("ucm_stream_agent", ())),
            around_context=Around(found.get("ucm_around_context", ())),
            around_message=Around(found.get("ucm_around_message", ())),
            around_resource=Around(found.get("ucm_around_resource", ())),
            around_agent_run=Around(found.get("ucm_around_agent_run", ())),
            bind_session=BindSession(found.get("ucm_bind_session", ())),
            shared_types=NamedTypes(found.get("ucm_shared_types", ())),
            owned_types=NamedTypes(found.get("ucm_owned_types", ())),
            context_opened=Notify(found.get("ucm_context_opened", ())),
            context_bound=Notify(found.get("ucm_context_bound", ())),
            context_closed=Notify(found.get("ucm_context_closed", ())),
            user_revoked=Notify(found.get("ucm_user_revoked", ())),
            access_denied=Notify(found.get("ucm_access_denied", ())),
        )


def _called(implementation: Implementation, *args: object) -> object:
    try:
        return implementation.call(*args)
    except Exception as error:
        implementation.blame(error)
        raise


def _is_async_cm(value: object) -> TypeGuard[AsyncCM]:
    return hasattr(type(value), "__aenter__") and hasattr(type(value), "__aexit__")


def _is_transaction(value: object) -> "TypeGuard[Transaction]":
    return all(callable(getattr(value, name, None)) for name in ("execute", "end"))
