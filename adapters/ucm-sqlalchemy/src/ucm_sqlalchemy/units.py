"""UnitOfWork: a session that is committed at the end of a block, or rolled back."""

import asyncio
import threading
from contextvars import Context, ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ucm_middleware import ConfigurationError, IsolationLevel, UserExecutionContext, current_context, revoke_handle
from ucm_middleware.transactions import checked_level
from ucm_sqlalchemy.ownership import LEASE, Lease, require_user

if TYPE_CHECKING:
    from ucm_sqlalchemy.database import Database

S = TypeVar("S", bound=Session | AsyncSession)


class Place(Generic[S]):
    """Where the running code finds the unit of work that it is in; one for each database."""

    __slots__ = ("_current",)

    def __init__(self) -> None:
        self._current: ContextVar[UnitOfWork[S] | None] = ContextVar("ucm_sqlalchemy_unit", default=None)

    def find(self, context: UserExecutionContext) -> "UnitOfWork[S] | None":
        """The innermost unit of this context and of this very task or thread, which alone may use its session."""
        unit = self._current.get()
        return unit if unit is not None and unit.is_of(context) else None

    def put(self, unit: "UnitOfWork[S] | None") -> None:
        """Make it the innermost one."""
        self._current.set(unit)


class UnitOfWork(Generic[S]):
    """``async with database.unit_of_work() as session:``, or ``with`` where the engine is synchronous.

    The outermost has a session of its own, commits it when the block ends well and rolls it back otherwise. One inside
    of another, in the same task, is a savepoint in the other's session.
    """

    __slots__ = ("_context", "_database", "_lease", "_level", "_outer", "_runner", "_savepoint", "_session", "handle")

    def __init__(self, database: "Database[S]", isolation_level: IsolationLevel | None) -> None:
        self._database = database
        self._level: IsolationLevel | None = checked_level(isolation_level)
        self._context: UserExecutionContext | None = None
        self._outer: UnitOfWork[S] | None = None
        self._session: S | None = None
        self._lease: Lease | None = None
        self._savepoint: Any = None
        self._runner: object = None
        self.handle: S
        """The session, as it is given out."""

    @property
    def is_nested(self) -> bool:
        """Whether it is a savepoint in another."""
        return self._outer is not None

    @property
    def has_committed(self) -> bool:
        """Whether something in it is kept: the block committed by itself before the end, or the end did."""
        return self._lease is not None and self._lease.has_committed

    def is_of(self, context: UserExecutionContext) -> bool:
        """Whether the running code, in this context, may use its session."""
        return self._session is not None and self._context is context and self._runner == _runner()

    async def __aenter__(self) -> S:
        self._require(is_async=True)
        session: Any = self._begin()
        if self.is_nested:
            self._savepoint = session.begin_nested()
            await self._savepoint.__aenter__()
        return self._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session: Any = self._leave()
        if self.is_nested:
            if self._can_go_back(error):
                await self._savepoint.__aexit__(kind, error, trace)
            return
        try:
            if error is None:
                self._require_open()
                await session.commit()
        finally:
            try:
                # Runs to its end, whoever is cancelled meanwhile.
                await session.__aexit__(kind, error, trace)
            finally:
                self._end(session)

    def __enter__(self) -> S:
        self._require(is_async=False)
        session: Any = self._begin()
        if self.is_nested:
            self._savepoint = session.begin_nested()
            self._savepoint.__enter__()
        return self._enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session: Any = self._leave()
        if self.is_nested:
            if self._can_go_back(error):
                self._savepoint.__exit__(kind, error, trace)
            return
        try:
            if error is None:
                self._require_open()
                session.commit()
        finally:
            try:
                session.close()
            finally:
                self._end(session)

    def _require(self, *, is_async: bool) -> None:
        if self._context is not None:
            raise ConfigurationError("a unit of work is entered once; ask database.unit_of_work() for another")
        if self._database.is_async is not is_async:
            word, engine = ("async with", "an AsyncEngine") if self._database.is_async else ("with", "an Engine")
            raise ConfigurationError(f"the database has {engine}: enter its units of work by `{word}`")

    def _begin(self) -> S:
        self._context = context = require_user(current_context())
        self._outer = outer = self._database.place.find(context)
        if outer is None:
            self._session = session = self._database.new_session(context, self._level)
            sync_session: Any = getattr(session, "sync_session", session)
            self._lease = sync_session.execution_options[LEASE]
            return session
        if self._level is not None and self._level != outer._level:
            raise ConfigurationError(
                f"isolation_level is {self._level!r} inside of a unit of work that has begun with another; give it to "
                "the outermost"
            )
        self._level, self._session = outer._level, outer._session
        return cast("S", outer._session)

    def _enter(self) -> S:
        assert self._context is not None
        assert self._session is not None
        self._runner = _runner()
        own = self._context.own
        self.handle = own(self._session, name="unit of work") if self._outer is None else self._outer.handle
        self._database.place.put(self)
        return self.handle

    def _leave(self) -> S:
        session, self._session = self._session, None
        self._database.place.put(self._outer)
        assert session is not None
        return session

    def _can_go_back(self, error: BaseException | None) -> bool:
        """False where an error ends it in a context that has closed: then the outermost rolls back all."""
        assert self._context is not None
        return error is None or self._context.is_open

    def _require_open(self) -> None:
        """Raise ContextClosedError where the context has closed: what the block did was rolled back with its session,
        of which a commit would say nothing.
        """
        assert self._context is not None
        self._context.require_usable()

    def _end(self, session: S) -> None:
        assert self._context is not None
        self._database.session_ended(self._context, session)
        # A session that is used again would begin again, and nobody would end it. In whoever's code: a generator may be
        # collected in another user's.
        Context().run(revoke_handle, self.handle)


def _runner() -> object:
    """The task that runs here, or else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else task
