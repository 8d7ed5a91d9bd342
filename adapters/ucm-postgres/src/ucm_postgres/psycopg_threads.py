"""Transactions of a user's on a ``ConnectionPool`` of psycopg_pool, for code in threads."""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from psycopg import Connection, Error, Transaction
from psycopg import IsolationLevel as PsycopgLevel
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool

from ucm_middleware import (
    HandleRevokedError,
    IsolationLevel,
    TransactionLog,
    UserExecutionContext,
    current_context,
    hookimpl,
)
from ucm_postgres.binding import Binding
from ucm_postgres.blocks import Nesting, inside, is_same, outcome_is_unknown, revoke
from ucm_postgres.checks import ResetMode, check_isolation_level, check_savepoint_level, checked_reset, role_error
from ucm_postgres.client_state import ClientStateError, Restore, drop_notifications, remember_psycopg
from ucm_postgres.counting import StatementCounter
from ucm_postgres.leftovers import Leftovers
from ucm_postgres.mark import Mark, psycopg_reported
from ucm_postgres.psycopg_connection import LEVELS, bind_query, has_ended, is_busy, refusal_of, shut_down
from ucm_postgres.reset import RESET, RESET_QUERY
from ucm_postgres.shared import psycopg_pool_types
from ucm_postgres.transaction import GRACE

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Connection[Any])


def reset(connection: Connection[Any]) -> None:
    """What the pool is to do with what comes back: ``ConnectionPool(..., reset=reset)``.

    The pool calls it in a thread of its own, so that nobody waits for it, and closes the connection when it fails.
    """
    autocommit = connection.autocommit
    connection.autocommit = True  # it asks the server nothing: only that no BEGIN goes before
    connection.execute(RESET_QUERY.encode(), prepare=False)
    drop_notifications(connection)
    connection.autocommit = autocommit


class PsycopgThreadPool(Generic[C]):
    """Gives each transaction of code in threads a connection of the pool, bound to its user.

    As ``PsycopgPool``, for plain ``def`` endpoints and scripts. The manager's own transactions are asynchronous and not
    made here: as a plugin it does no more than tell ``isolation_report`` what users share by design.

    Raises ConfigurationError for a pool that resets nothing.
    """

    def __init__(
        self,
        pool: ConnectionPool[C],
        binding: Binding | None = None,
        *,
        reset: ResetMode = "return",
        name: str = "postgres",
    ) -> None:
        self._pool = pool
        self._binding = binding or Binding()
        checked = checked_reset(reset, pool, "ConnectionPool(..., reset=ucm_postgres.psycopg_threads.reset)")
        self._reset_first = RESET if checked == "begin" else ()
        self._name = name
        self._counter = StatementCounter()
        self._leftovers: Leftovers[_Lent[C]] = Leftovers(self._abandon)
        self._current: ContextVar[tuple[_Lent[C], int] | None] = ContextVar("ucm_postgres_threads", default=None)

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (PsycopgThreadPool, StatementCounter, *psycopg_pool_types())

    @contextmanager
    def transaction(self, *, isolation_level: IsolationLevel | None = None) -> Generator[C]:
        """A transaction of the user that the calling code runs for: its connection, bound, as an owned handle.

        As ``PsycopgPool.transaction``, with the same errors. When the context closes while a thread is still inside of
        the block, the line is cut: the statement under way fails, and the connection is closed.
        """
        context = current_context()
        outer, depth = self._current.get() or (None, 0)
        if outer is not None and outer.is_open and is_same(self._binding, outer.context, context):
            check_savepoint_level(isolation_level, outer.isolation_level)
            with outer.nesting.savepoint(depth), inside(self._current, (outer, depth + 1)), outer.handle.transaction():
                yield outer.handle
                outer.nesting.require_innermost(depth + 1)
            return
        self._binding.require_user(context)  # before anything counts as a use of a context that may still get its user
        lent: _Lent[C] = _Lent(context, isolation_level, self._name, self._binding)
        with self._leftovers.watch(context, lent):
            try:
                self._begin(lent)
                with inside(self._current, (lent, 0)):
                    yield lent.handle
                lent.nesting.require_innermost(0)
                context.require_usable()  # its deadline may have come, though nothing has closed it yet
            except BaseException as error:
                self._roll_back(lent, error)
                if (role_refused := role_error(self._binding, error)) is not None and not lent.is_begun:
                    raise role_refused from error
                raise
            else:
                self._commit(lent)

    def _begin(self, lent: "_Lent[C]") -> None:
        context = lent.context
        self._binding.require_user(context)
        lent.log.begin()
        connection = lent.take(self._pool.getconn())
        # Now, and not before: a signed value ages while the pool lets wait.
        settings = self._binding.settings(context)
        context.bind_session(connection)
        if lent.isolation_level is not None:
            connection.isolation_level = LEVELS[lent.isolation_level]
        connection.autocommit = True  # else a BEGIN of its own goes before the first statement
        lent.mark = mark = Mark(psycopg_reported(connection))
        lent.block = Transaction(connection)
        with connection.pipeline():  # all of it is one round trip
            lent.block.__enter__()
            for statement in self._reset_first:
                connection.execute(statement.encode(), prepare=False)
            # The application's row factory may take no two columns of one name.
            connection.cursor(row_factory=tuple_row).execute(*bind_query((*settings, *mark.settings)))
        mark.begun()
        lent.handle = context.own(connection, name="transaction")
        self._counter.begin(connection, lent.log)
        lent.client_state = remember_psycopg(connection)
        lent.is_begun = True

    def _commit(self, lent: "_Lent[C]") -> None:
        if not lent.claim():  # the context closed meanwhile, and with it the connection
            raise lent.over_error()
        self._let_go(lent)
        _settle(lent.connection)  # what is under way may fail
        refusal = refusal_of(lent.connection, lent.mark)
        if refusal is not None:
            self._undo(lent, refusal)
            raise refusal
        try:
            assert lent.block is not None
            lent.block.__exit__(None, None, None)
            lent.log.commit()
        except BaseException as error:
            if outcome_is_unknown(error):
                lent.log.lost(error)
            else:
                lent.log.rollback(error)
            self._discard(lent.connection)
            raise
        self._give_back(lent)

    def _roll_back(self, lent: "_Lent[C]", error: BaseException) -> None:
        if lent.claim():
            self._let_go(lent)
            _settle(lent.connection)
            self._undo(lent, error)

    def _undo(self, lent: "_Lent[C]", error: BaseException) -> None:
        lent.undone(error)
        connection = lent.connection
        if (lent.block is None or lent.is_begun) and not is_busy(connection):
            if lent.block is not None:
                lent.block.__exit__(type(error), error, error.__traceback__)  # its own failures are only logged
            if connection.pgconn.transaction_status == TransactionStatus.IDLE:
                self._give_back(lent)
                return
        self._discard(connection)

    def _abandon(self, lent: "_Lent[C]") -> None:
        connection = lent.abandoned()
        if connection is None:
            return
        # Else its thread is in the middle of something: it finds the line dead, and its block closes the connection.
        lent.is_stopped = True
        if not connection.lock.acquire(blocking=False):
            threading.Thread(target=_stop, args=(connection,), name="ucm_postgres stops a statement").start()
        else:
            try:
                if not lent.claim():
                    return
                lent.undone(lent.over_error())
                connection.pgconn.finish()
            finally:
                connection.lock.release()
            self._let_go(lent)
            self._pool.putconn(connection)

    def _let_go(self, lent: "_Lent[C]") -> None:
        self._counter.end(lent.connection)
        if lent.is_begun:
            revoke(lent.handle)

    def _give_back(self, lent: "_Lent[C]") -> None:
        if lent.is_stopped:  # its line may be cut later than its block ends: nobody else is to have it then
            self._discard(lent.connection)
            return
        try:
            lent.restore()
        except (Error, ClientStateError):
            logger.warning("a connection could not be given its settings back, and is closed", exc_info=True)
            self._discard(lent.connection)
        else:
            self._pool.putconn(lent.connection)

    def _discard(self, connection: C) -> None:
        shut_down(connection.pgconn)
        _settle(connection)  # whoever is in the middle of something finds the line dead, and lets go
        connection.pgconn.finish()  # close() would give it to a pool with close_returns
        self._pool.putconn(connection)


def _settle(connection: Connection[Any]) -> None:
    """Wait until nothing is under way. A generator of rows that nobody goes on with is under way for good: not long."""
    if connection.lock.acquire(timeout=GRACE):
        connection.lock.release()


def _stop(connection: Connection[Any]) -> None:
    """Have the server stop what it is doing, and then cut the line, whether it has or not."""
    try:
        connection.cancel_safe(timeout=GRACE)
    except Error:
        logger.warning("a statement of a context that has closed could not be cancelled: its line is cut")
    finally:
        shut_down(connection.pgconn)


class _Lent(Generic[C]):
    """One connection while a block has it. Its thread and the teardown may both want to end it: one of them does."""

    connection: C
    handle: C

    def __init__(
        self, context: UserExecutionContext, isolation_level: IsolationLevel | None, name: str, binding: Binding
    ) -> None:
        check_isolation_level(isolation_level)
        self.context = context
        self.isolation_level: IsolationLevel | None = isolation_level
        self.log = TransactionLog(context, name, isolation_level=isolation_level, **binding.about)
        self.block: Transaction | None = None
        self.client_state: Restore | None = None
        self.mark: Mark | None = None
        self.nesting = Nesting()
        self.is_begun = False
        self.is_stopped = False
        self._is_over = False
        self._is_taken = False
        self._lock = threading.Lock()
        self._before: tuple[bool, PsycopgLevel | None] = (False, None)

    @property
    def is_open(self) -> bool:
        return self.is_begun and not self._is_over

    def take(self, connection: C) -> C:
        """A connection came from the pool; perhaps the context has closed by then, which whoever asks it is told."""
        with self._lock:
            self.connection = connection
            self._is_taken = True
        self._before = (connection.autocommit, connection.isolation_level)
        return connection

    def restore(self) -> None:
        """Give the connection what it came with on this side of the line. The server is not asked."""
        if self.client_state is not None:
            self.client_state()
        self.connection.autocommit, self.connection.isolation_level = self._before

    def undone(self, error: BaseException) -> None:
        """Put its end on record. What SQL has ended is not rolled back here: perhaps it was committed."""
        if self.is_begun and has_ended(self.connection, self.mark):
            self.log.lost(error)
        else:
            self.log.rollback(error)

    def claim(self) -> bool:
        """True for whoever is to end it; False when there is nothing to end."""
        with self._lock:
            claimed = self._is_taken and not self._is_over
            self._is_over = True
            return claimed

    def abandoned(self) -> C | None:
        """The connection that is still out, if there is one."""
        with self._lock:
            return self.connection if self._is_taken and not self._is_over else None

    def over_error(self) -> HandleRevokedError:
        return HandleRevokedError(self.context.request_id, self.context.lifetime.where(), "transaction")
