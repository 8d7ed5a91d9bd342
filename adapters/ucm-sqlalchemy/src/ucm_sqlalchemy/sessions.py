"""The sessions of each context: made when asked for, closed with the context at the latest."""

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar, cast

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from ucm_middleware import UserExecutionContext
from ucm_sqlalchemy.ownership import LEASE, Lease

S = TypeVar("S", bound=Session | AsyncSession)

AnyEngine = Engine | AsyncEngine

GRACE: Final = 5.0
"""Seconds that a rollback at the teardown may take. Then the connection is thrown away."""


@dataclass(slots=True, eq=False)
class Held(Generic[S]):
    """The sessions of one context: its own, and those of its units of work."""

    own: S | None = None
    open: set[S] = field(default_factory=set[S])


class Sessions(Generic[S]):
    """Makes sessions, and keeps them by context.

    ``make`` is a class of sessions or what calls one, ``options`` what it takes besides the engine.
    """

    __slots__ = ("_held", "_make", "_options", "_prepare")

    def __init__(
        self, make: Callable[..., S], options: Mapping[str, Any], prepare: Callable[[S, str], object] | None
    ) -> None:
        self._make = make
        self._options: Final = dict(options)
        self._prepare = prepare
        # By the context itself, weakly, and nothing in it refers to the context strongly.
        self._held: weakref.WeakKeyDictionary[UserExecutionContext, Held[S]] = weakref.WeakKeyDictionary()

    def own(self, context: UserExecutionContext, engine: Callable[[], AnyEngine]) -> S:
        """The context's own session, made at the first call."""
        held = self._of(context)
        if held.own is None:
            held.own = self._open(held, context, engine(), {})
        return held.own

    def new(self, context: UserExecutionContext, engine: AnyEngine, **options: Any) -> S:
        """Another one, for a unit of work."""
        return self._open(self._of(context), context, engine, options)

    def forget(self, context: UserExecutionContext, session: S) -> None:
        """It is closed: the teardown need not do it."""
        held = self._held.get(context)
        if held is not None:
            held.open.discard(session)

    def make(self, context: UserExecutionContext, engine: AnyEngine, **options: Any) -> S:
        """One that the caller closes."""
        given = {**self._options, **options}
        # The session's transactions are its context's, in whichever code they begin.
        given["execution_options"] = {**given.get("execution_options", {}), LEASE: Lease(context)}
        session = self._make(bind=engine, **given)
        if self._prepare is not None:
            self._prepare(session, context.user_id)
        return session

    def _open(self, held: Held[S], context: UserExecutionContext, engine: AnyEngine, options: Mapping[str, Any]) -> S:
        session = self.make(context, engine, **options)
        held.open.add(session)
        return session

    def _of(self, context: UserExecutionContext) -> Held[S]:
        held = self._held.get(context)
        if held is None:
            held = Held[S]()
            context.callback(_close_sessions, held)  # which refuses a context that is closing
            self._held[context] = held
        return held


def _close_sessions(held: Held[Any]) -> Awaitable[None] | None:
    sessions = list(held.open)
    held.open.clear()
    held.own = None
    return end_all(sessions)


def end_all(sessions: list[Any]) -> Awaitable[None] | None:
    """Roll back and close. What must wait is awaited where there is an event loop: sync sessions wait in a thread."""
    if not any(is_busy(session) for session in sessions):
        for session in sessions:
            cast("Session", getattr(session, "sync_session", session)).close()  # which asks nothing of the database
        return None
    if isinstance(sessions[0], AsyncSession):
        return _aclose_all(sessions)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        close_all(sessions)
        return None
    return asyncio.to_thread(close_all, sessions)


def is_busy(session: Session | AsyncSession) -> bool:
    """Whether it may hold a connection: only then does closing it ask something of the database."""
    return session.in_transaction()


def close_all(sessions: list[Session]) -> None:
    """Close each; a connection that cannot be given back is thrown away."""
    for session in sessions:
        try:
            session.close()
        except Exception:  # noqa: BLE001 - busy in another thread, or in a state that it cannot leave
            _throw_away(session)


async def _aclose_all(sessions: list[AsyncSession]) -> None:
    for session in sessions:
        try:
            async with asyncio.timeout(GRACE):
                await session.close()
        except Exception:  # noqa: BLE001 - busy in another task, or in a state that it cannot leave
            await greenlet_spawn(_throw_away, session.sync_session)


def _throw_away(session: Session) -> None:
    """Close the connection for good. The session may have forgotten it, in trying to give it back."""
    lease: Lease = session.execution_options[LEASE]
    connection = lease.connection
    session.invalidate()
    if connection is not None and not connection.closed:
        connection.invalidate()
        connection.close()
