"""Transactions of a user's on a pool of asyncpg."""

import contextlib
from collections.abc import Sequence
from typing import Any, Final, cast

import asyncpg  # type: ignore[import-untyped]
from asyncpg.pool import Pool  # type: ignore[import-untyped]
from asyncpg.transaction import Transaction  # type: ignore[import-untyped]

from ucm_middleware import ConfigurationError, IsolationLevel, StatementResult, UserExecutionContext, hookimpl
from ucm_postgres.binding import Binding
from ucm_postgres.blocks import ENDED_MESSAGE, FAILED_MESSAGE, LOST_MESSAGE
from ucm_postgres.checks import ResetMode, checked_reset
from ucm_postgres.client_state import Restore, remember_asyncpg
from ucm_postgres.mark import Reported, asyncpg_reported
from ucm_postgres.reset import RESET_QUERY
from ucm_postgres.shared import asyncpg_types
from ucm_postgres.transaction import GRACE, UserTransaction, UserTransactions

LEVELS: Final[dict[IsolationLevel | None, str | None]] = {
    None: None,
    "READ COMMITTED": "read_committed",
    "REPEATABLE READ": "repeatable_read",
    "SERIALIZABLE": "serializable",
}


async def reset(connection: Any) -> None:
    """What the pool is to do with what comes back: ``asyncpg.create_pool(..., reset=reset)``.

    It takes the place of asyncpg's own reset, which keeps the role and temporary tables, and costs the same round trip.
    The pool closes the connection when it fails.
    """
    await connection.execute(RESET_QUERY)


class AsyncpgPool(UserTransactions[Any]):
    """A plugin: gives each transaction a connection of the pool, bound to its user.

    The pool is the application's own, made with ``reset=ucm_postgres.asyncpg.reset``, or, behind PgBouncer in
    transaction mode, with one that does nothing, ``reset="begin"`` being given here. ``name`` stands for the database
    in records; the statements that they count, and whose errors are noticed when the block catches them, are those of
    the connection's ``execute``, ``executemany`` and ``fetch...``.

    Raises ConfigurationError for a pool that resets nothing.
    """

    def __init__(
        self,
        pool: Pool,
        binding: Binding | None = None,
        *,
        reset: ResetMode = "return",
        name: str = "postgres",
    ) -> None:
        super().__init__(binding)
        self._pool = pool
        self._reset = checked_reset(reset, pool, "asyncpg.create_pool(..., reset=ucm_postgres.asyncpg.reset)")
        self._name = name

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (UserTransactions, *asyncpg_types())

    def _open(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> UserTransaction[Any]:
        reset_first = self._reset == "begin"
        return _AsyncpgTransaction(context, self._binding, self._name, isolation_level, self._pool, reset_first)


class _AsyncpgTransaction(UserTransaction[Any]):
    def __init__(
        self,
        context: UserExecutionContext,
        binding: Binding,
        name: str,
        isolation_level: IsolationLevel | None,
        pool: Any,
        reset_first: bool,
    ) -> None:
        super().__init__(context, binding, name, isolation_level)
        self._pool = pool
        self._reset_first = reset_first
        self._block: Transaction | None = None
        self._restore: Restore | None = None
        self._saw_error = False

    async def _acquire(self) -> Any:
        return await self._pool.acquire()

    async def _begin(self, connection: Any, settings: tuple[tuple[str, str], ...]) -> None:
        self._block = block = connection.transaction(isolation=LEVELS[self.isolation_level])
        await block.start()
        if self._reset_first:
            await connection.execute(RESET_QUERY)
        calls = ", ".join(f"set_config(${number}, ${number + 1}, true)" for number in range(1, 2 * len(settings), 2))
        await connection.execute(f"SELECT {calls}", *[part for setting in settings for part in setting])
        self._restore = remember_asyncpg(connection)
        connection.add_query_logger(self._count)

    async def _run(self, connection: Any, statement: object, parameters: object) -> StatementResult:
        if parameters is not None and (isinstance(parameters, str) or not isinstance(parameters, Sequence)):
            raise ConfigurationError(
                f"parameters is {type(parameters).__name__}; asyncpg takes a list, for $1, $2 and so on"
            )
        self.log.statements += 1
        try:
            prepared = await connection.prepare(statement)
            rows = await prepared.fetch(*cast("Sequence[object]", parameters or ()))
        except Exception:
            self._saw_error = True
            raise
        count = prepared.get_statusmsg().rpartition(" ")[2]
        return StatementResult(tuple(map(dict, rows)), int(count) if count.isdecimal() else -1)

    async def _refusal(self, connection: Any) -> Exception | None:
        try:
            connection.remove_query_logger(self._count)
        except asyncpg.InterfaceError:  # the pool has heard of it already
            return cast("Exception", asyncpg.InterfaceError(LOST_MESSAGE))
        if self._saw_error or self._is_gone():
            await self._find_out(connection)
        if self._has_ended(connection):
            return cast("Exception", asyncpg.InterfaceError(ENDED_MESSAGE))
        return cast("Exception", asyncpg.InFailedSQLTransactionError(FAILED_MESSAGE)) if self._saw_error else None

    def _reports(self, connection: Any) -> Reported:
        return asyncpg_reported(connection)

    def _has_ended(self, connection: Any) -> bool:
        if connection.is_closed():
            return False
        return not connection.is_in_transaction() or (self._is_gone() and not self._saw_error)

    def _is_gone(self) -> bool:
        """Whether the transaction has ended or failed: what failed in a prepared statement is not heard of."""
        return self._mark is not None and self._mark.is_gone()

    async def _find_out(self, connection: Any) -> None:
        """Ask whether it has failed: asyncpg keeps that from everybody, and what COMMIT answers."""
        try:
            await connection.execute("SELECT 1")
        except asyncpg.InFailedSQLTransactionError:
            self._saw_error = True
        else:
            self._saw_error = False

    async def _commit(self, connection: Any) -> None:
        assert self._block is not None
        await self._block.commit()

    async def _roll_back(self, connection: Any, error: BaseException) -> None:
        connection.remove_query_logger(self._count)
        if self._is_gone() and not self._saw_error:
            await self._find_out(connection)
        self._look(connection, error)
        assert self._block is not None
        await self._block.rollback()

    async def _give_back(self, connection: Any) -> None:
        if self._restore is not None:
            self._restore()
        await self._pool.release(connection, timeout=GRACE)  # the reset is a question too

    def _cut(self, connection: Any) -> None:
        with contextlib.suppress(asyncpg.InterfaceError):  # it has been given back already
            if not connection.is_closed():
                connection.terminate()

    async def _discard(self, connection: Any) -> None:
        self._cut(connection)
        await self._pool.release(connection)  # which it is, once it has been terminated

    def _count(self, query: Any) -> None:
        self.log.statements += 1
        if query.exception is not None:
            self._saw_error = True
        elif query.query.startswith("ROLLBACK TO "):
            self._saw_error = False
