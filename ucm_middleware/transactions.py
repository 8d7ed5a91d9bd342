"""Transactions of a user's: what an adapter of a database gives the manager, and how it puts them on record."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast, get_args

from ucm_middleware.errors import ConfigurationError

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext

logger = logging.getLogger(__name__)

IsolationLevel = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""How far a transaction is kept apart from those beside it, in the words of the SQL standard."""

Phase = Literal["begin", "commit", "rollback", "unknown"]

PHASES: Final[tuple[str, ...]] = get_args(Phase)
"""How a transaction may be on record; the last is a commit that nobody answered."""

LEVELS: Final[tuple[str, ...]] = get_args(IsolationLevel)


@dataclass(frozen=True, slots=True)
class StatementResult:
    """What a statement gave: its rows, each by the names of its columns, and how many rows it touched (-1 where the
    driver does not say).
    """

    rows: tuple[Mapping[str, Any], ...]
    rowcount: int


class Transaction(Protocol):
    """One transaction of one context. Nothing is asked of the database before its first statement."""

    @property
    def session(self) -> object:
        """What the application works with inside of it: a session or a connection of the adapter's framework."""
        ...

    async def execute(self, statement: object, parameters: object) -> StatementResult:
        """Run one statement. ``parameters`` is what the framework takes with it, None for none."""
        ...

    def end(self, error: BaseException | None) -> Awaitable[None] | None:
        """Commit, or with an error roll back, and give the connection back. What comes after that does nothing.

        When this is cancelled the connection is thrown away, and whether it was committed is not known.
        """
        ...


class TransactionLog:
    """For adapters: puts one transaction of a context on record, its begin and its end.

    The records are "transaction", and their data the ``phase`` ("begin", "commit", "rollback", or "unknown" where a
    commit was asked for and no answer came), the ``database`` by a name that the application gave, how many
    ``statements`` there were, and what else is given. Never what they said.
    """

    __slots__ = ("_about", "_begun", "_context", "_host", "_is_open", "statements")

    def __init__(self, context: "UserExecutionContext", database: str, **about: object) -> None:
        self._context = context
        self._host = context.host  # which the context lets go of when it closes
        given = {name: value for name, value in about.items() if value is not None}
        self._about: dict[str, object] = {"database": database, **given}
        self._begun = 0.0
        self._is_open = False
        self.statements = 0
        """How many statements there were so far: counted by the adapter."""

    def begin(self) -> None:
        """Before the transaction begins. Raises as ``context.record`` does, and then it must not begin."""
        self._context.record("transaction", data={"phase": "begin", **self._about})
        self._begun = time.monotonic()
        self._is_open = True

    def commit(self) -> None:
        """It is committed. Never raises: what has happened has happened."""
        self._end("commit", None)

    def rollback(self, error: BaseException | None = None) -> None:
        """It is rolled back, or lost with its connection; ``error`` is why, None where the application wanted it so."""
        self._end("rollback", error)

    def lost(self, error: BaseException | None) -> None:
        """Its commit was asked for, and what became of that is not known; ``error`` is why."""
        self._end("unknown", error)

    def _end(self, phase: Phase, error: BaseException | None) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._host is None:
            return
        data: dict[str, object] = {"phase": phase, **self._about, "statements": self.statements}
        reason: str | None = None
        if error is not None:
            reason = self._context.lifetime.reason or _reason(error)
            data["error"] = type(error).__name__
        seconds = time.monotonic() - self._begun
        try:
            self._host.report(self._context, "transaction", "ok" if error is None else "failed", reason, seconds, data)
        except Exception:
            # Whatever a ledger raises: it has ended, and its error is not to be hidden by another.
            logger.exception("the %s of a transaction on %s could not be recorded", phase, self._about["database"])


def checked_level(level: object) -> IsolationLevel | None:
    """The level as it was given; None for the database's own. Raises ConfigurationError for another word."""
    if level is not None and level not in LEVELS:
        raise ConfigurationError(f"isolation_level is {level!r}; give one of {', '.join(LEVELS)}, or None")
    return cast("IsolationLevel | None", level)


def _reason(error: BaseException) -> str:
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
