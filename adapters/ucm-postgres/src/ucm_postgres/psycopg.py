"""Transactions of a user's on an ``AsyncConnectionPool`` of psycopg_pool."""

import asyncio
import contextlib
from typing import Any, TypeVar, cast

from psycopg import AsyncConnection, AsyncTransaction
from psycopg import IsolationLevel as PsycopgLevel
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool

from ucm_middleware import IsolationLevel, StatementResult, UserExecutionContext, hookimpl
from ucm_postgres.binding import Binding
from ucm_postgres.checks import ResetMode, checked_reset
from ucm_postgres.client_state import Restore, drop_notifications, remember_psycopg
from ucm_postgres.counting import StatementCounter
from ucm_postgres.mark import Reported, psycopg_reported
from ucm_postgres.psycopg_connection import LEVELS, bind_query, has_ended, is_busy, refusal_of, shut_down
from ucm_postgres.reset import RESET, RESET_QUERY
from ucm_postgres.shared import psycopg_pool_types
from ucm_postgres.transaction import GRACE, UserTransaction, UserTransactions

C = TypeVar("C", bound=AsyncConnection[Any])


async def reset(connection: AsyncConnection[Any]) -> None:
    """What the pool is to do with what comes back: ``AsyncConnectionPool(..., reset=reset)``.

    The pool calls it in a task of its own, so that nobody waits for it, and closes the connection when it fails.
    """
    autocommit = connection.autocommit
    await connection.set_autocommit(True)  # it asks the server nothing: only that no BEGIN goes before
    await connection.execute(RESET_QUERY.encode(), prepare=False)
    drop_notifications(connection)
    await connection.set_autocommit(autocommit)


class PsycopgPool(UserTransactions[C]):
    """A plugin: gives each transaction a connection of the pool, bound to its user.

    The pool is the application's own, made with ``reset=ucm_postgres.psycopg.reset``, or, behind PgBouncer in
    transaction mode, without one, ``reset="begin"`` being given here. ``name`` stands for the database in records.

    Raises ConfigurationError for a pool that resets nothing.
    """

    def __init__(
        self,
        pool: AsyncConnectionPool[C],
        binding: Binding | None = None,
        *,
        reset: ResetMode = "return",
        name: str = "postgres",
    ) -> None:
        super().__init__(binding)
        self._pool = pool
        self._reset = checked_reset(reset, pool, "AsyncConnectionPool(..., reset=ucm_postgres.psycopg.reset)")
        self._name = name
        self._counter = StatementCounter()

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (UserTransactions, StatementCounter, *psycopg_pool_types())

    def _open(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> UserTransaction[C]:
        reset_first = RESET if self._reset == "begin" else ()
        return _PsycopgTransaction(
            context, self._binding, self._name, isolation_level, self._pool, self._counter, reset_first
        )


class _PsycopgTransaction(UserTransaction[C]):
    def __init__(
        self,
        context: UserExecutionContext,
        binding: Binding,
        name: str,
        isolation_level: IsolationLevel | None,
        pool: AsyncConnectionPool[C],
        counter: StatementCounter,
        reset_first: tuple[str, ...],
    ) -> None:
        super().__init__(context, binding, name, isolation_level)
        self._pool = pool
        self._counter = counter
        self._reset_first = reset_first
        self._level_before: PsycopgLevel | None = None
        self._autocommit_before: bool | None = None
        self._block: AsyncTransaction | None = None
        self._restore: Restore | None = None
        self._is_stuck = False

    async def _acquire(self) -> C:
        return await self._pool.getconn()

    async def _begin(self, connection: C, settings: tuple[tuple[str, str], ...]) -> None:
        if self.isolation_level is not None:
            self._level_before = connection.isolation_level
            await connection.set_isolation_level(LEVELS[self.isolation_level])
        self._autocommit_before = connection.autocommit
        await connection.set_autocommit(True)  # else a BEGIN of its own goes before the first statement
        self._block = AsyncTransaction(connection)
        async with connection.pipeline():  # all of it is one round trip
            await self._block.__aenter__()
            for statement in self._reset_first:
                await connection.execute(statement.encode(), prepare=False)
            # The application's row factory may take no two columns of one name.
            await connection.cursor(row_factory=tuple_row).execute(*bind_query(settings))
        self._counter.begin(connection, self.log)
        self._restore = remember_psycopg(connection)

    async def _run(self, connection: C, statement: object, parameters: object) -> StatementResult:
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(cast("Any", statement), cast("Any", parameters))
            rows = tuple(await cursor.fetchall()) if cursor.description else ()
            return StatementResult(rows, cursor.rowcount)

    async def _refusal(self, connection: C) -> Exception | None:
        await _settled(connection)  # what is under way may fail
        self._is_stuck = is_busy(connection)
        return refusal_of(connection, self._mark)

    def _reports(self, connection: C) -> Reported:
        return psycopg_reported(connection)

    def _has_ended(self, connection: C) -> bool:
        return has_ended(connection, self._mark)

    async def _commit(self, connection: C) -> None:
        self._counter.end(connection)
        assert self._block is not None
        await self._block.__aexit__(None, None, None)

    async def _roll_back(self, connection: C, error: BaseException) -> None:
        self._counter.end(connection)
        assert self._block is not None
        if not self._is_stuck:  # else it has had its time
            await _settled(connection)
        self._look(connection, error)
        if is_busy(connection):
            raise RuntimeError("the transaction could not be rolled back: something is still under way")
        await self._block.__aexit__(type(error), error, error.__traceback__)  # its own failures are only logged
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            raise RuntimeError("the transaction could not be rolled back")

    async def _give_back(self, connection: C) -> None:
        if self._restore is not None:
            self._restore()
        if self.isolation_level is not None and connection.isolation_level is not self._level_before:
            await connection.set_isolation_level(self._level_before)
        if self._autocommit_before is not None:
            await connection.set_autocommit(self._autocommit_before)
        await self._pool.putconn(connection)

    def _cut(self, connection: C) -> None:
        shut_down(connection.pgconn)

    async def _discard(self, connection: C) -> None:
        self._counter.end(connection)
        shut_down(connection.pgconn)
        await _settled(connection)  # whoever is in the middle of something finds the line dead, and lets go
        connection.pgconn.finish()  # close() would give it to a pool with close_returns
        await self._pool.putconn(connection)


async def _settled(connection: AsyncConnection[Any]) -> None:
    """Wait until nothing is under way. A generator of rows that nobody goes on with is under way for good: not long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE), connection.lock:
            return
