"""SessionTransaction: what the manager is given for ``create_context_with_transaction``."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import Result, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ucm_middleware import StatementResult

S = TypeVar("S", bound=Session | AsyncSession)


class SessionTransaction(Generic[S]):
    """One transaction in a session of its own. Text is a statement in SQL, with parameters by name, as ``:name``."""

    __slots__ = ("_has_ended", "_session")

    def __init__(self, session: S) -> None:
        self._session = session
        self._has_ended = False

    @property
    def session(self) -> S:
        """What the application works with."""
        return self._session

    async def execute(self, statement: object, parameters: object) -> StatementResult:
        """Run one statement: text, or what SQLAlchemy executes."""
        executable: Any = text(statement) if isinstance(statement, str) else statement
        session: Any = self._session
        if isinstance(session, AsyncSession):
            return await session.run_sync(_execute, executable, parameters)
        return await asyncio.to_thread(_execute, session, executable, parameters)

    def end(self, error: BaseException | None) -> Awaitable[None] | None:
        """Commit or roll back, and close. Asks nothing of the database when nothing was begun."""
        if self._has_ended:
            return None
        self._has_ended = True
        session: Any = self._session
        if isinstance(session, AsyncSession):
            return _aend(session, error)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            _end(session, error)
            return None
        return asyncio.to_thread(_end, session, error)


def _execute(session: Session, statement: Any, parameters: Any) -> StatementResult:
    # Session's own: that of SQLModel's warns of it.
    result = cast("Result[Any]", Session.execute(session, statement, parameters))
    rowcount = getattr(result, "rowcount", -1)  # before the rows, with which psycopg forgets it
    rows = tuple(dict(row) for row in result.mappings()) if getattr(result, "returns_rows", True) else ()
    return StatementResult(rows, rowcount)


def _end(session: Session, error: BaseException | None) -> None:
    try:
        if error is None:
            session.commit()
    finally:
        session.close()


async def _aend(session: AsyncSession, error: BaseException | None) -> None:
    async with session:
        if error is None:
            await session.commit()
