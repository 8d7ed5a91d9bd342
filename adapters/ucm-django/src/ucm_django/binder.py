"""Binder: ties each transaction of one of Django's connections to the user that the running code works for."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import psycopg
from django.db import InterfaceError, connections, transaction
from psycopg.pq import TransactionStatus

from ucm_django import conf
from ucm_django.begun import Begun
from ucm_django.identity import Runner, runner_here
from ucm_django.running import noted
from ucm_django.statements import is_commit, is_rollback, is_set_transaction, is_single
from ucm_django.telling import Telling, Wrapper
from ucm_middleware import ConfigurationError, CrossUserAccessError, UserContextError
from ucm_middleware.transactions import TransactionLog

Execute = Callable[[Any, Any, bool, dict[str, Any]], Any]
"""What Django gives an execute wrapper to go on with."""


class Binder:
    """Of one DatabaseWrapper, all statements of which pass through ``execute``, ``call`` and ``tie``."""

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = wrapper
        self._telling = Telling(wrapper)
        self._begun: Begun | None = None
        self._is_binding = False
        self._is_untied = False  # a transaction was begun, and what came was SET TRANSACTION alone
        self.is_housekeeping = False
        """Whether Django does things of its own on the connection, such as savepoints."""

    @cached_property
    def _is_off(self) -> bool:
        return self._wrapper.alias not in _configured() or self._wrapper.alias in conf.unbound_databases()

    def connected(self) -> None:
        """The driver's connection is to be made, or to be taken from the pool. Raises ConfigurationError for a wrong
        setting of the project.
        """
        _ = self._is_off  # Read here and in ``Telling``, and not before: Django's system checks make wrappers too.
        self._telling.connected()
        self._begun = None
        self._is_untied = False

    def execute(self, execute: Execute, sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
        """The execute wrapper: all that goes through ``execute`` and ``executemany`` of Django's cursors.

        Raises, before anything is sent, what ``runner_here`` and ``Binding.settings`` raise, CrossUserAccessError in a
        transaction that was begun for somebody else, and InterfaceError for a cursor of a connection given back.
        """

        def run() -> Any:
            return execute(sql, params, many, context)

        if self._is_off or self._is_binding:
            return run()
        cursor = context["cursor"].cursor
        self.require_own(cursor)
        if self._is_test_case and self.is_housekeeping:
            return run()
        runner = runner_here()
        can_go_along = not many and is_single(sql, cursor) and not _has_other_binders(runner)
        with nullcontext() if can_go_along or not self._is_alone() else self._atomic():
            return self._execute_tied(runner, run, sql, can_go_along=can_go_along)

    def call(self, cursor: Any, function: Callable[[], Any]) -> Any:
        """The same for what Django hands to the driver past its wrappers, and what is over when it returns."""
        if self._is_off or self._is_binding:
            return function()
        self.require_own(cursor)
        runner = runner_here()
        with self._atomic() if self._is_alone() else nullcontext():
            return self._execute_tied(runner, function)

    def tie(self, cursor: Any, name: str) -> None:
        """The same before what goes on after its call, such as COPY. Raises TransactionManagementError outside of a
        transaction, which it needs around it.
        """
        if self._is_off or self._is_binding:
            return
        self.require_own(cursor)
        runner = runner_here()
        if self._is_alone():
            raise transaction.TransactionManagementError(
                f"cursor.{name}() goes on after the call, and must be in one transaction with its user: "
                "wrap it in transaction.atomic()"
            )
        self._execute_tied(runner, lambda: None)

    def is_own(self, cursor: Any) -> bool:
        """Whether the driver's cursor is one of the connection that this thread has now. A pool lends the connection
        of an older one to somebody else.
        """
        return self._is_off or cursor.connection is self._wrapper.connection

    def require_own(self, cursor: Any) -> None:
        """Raise InterfaceError for a cursor that is not."""
        if not self.is_own(cursor):
            raise InterfaceError(
                f"the cursor is of a connection to database {self._wrapper.alias!r} that was closed or given back; "
                "ask for a new one with connection.cursor()"
            )

    def require_reader(self, cursor: Any) -> None:
        """Raise CrossUserAccessError for a cursor on the server that somebody else has opened: reading on is asking."""
        self.require_own(cursor)
        if (
            isinstance(cursor, psycopg.ServerCursor)
            and not self._is_off
            and not self._telling.is_in_hands(runner_here())
        ):
            raise CrossUserAccessError(
                f"the cursor on database {self._wrapper.alias!r} was opened for somebody else; "
                "read it in the context that opened it, or ask anew"
            )

    def refusal_to_commit(self) -> Exception | None:
        """Why the transaction must not be committed: its context has ended, or one of its statements failed, where the
        server would answer COMMIT with a rollback that the driver does not tell of. None when it may be.
        """
        refusal = self._refusal_of_context()
        if refusal is None and self._begun is not None and self._status is TransactionStatus.INERROR:
            return transaction.TransactionManagementError(
                "a statement of this transaction failed, so that nothing of it can be committed; let its error "
                "through, or run what may fail in an atomic() of its own"
            )
        return refusal

    def _refusal_of_context(self) -> UserContextError | None:
        begun = self._begun
        if begun is not None and begun.runner.context is not None:
            try:
                begun.runner.context.require_usable()
            except UserContextError as error:
                return error
        return None

    def ended(self, error: BaseException | None = None, *, rolled_back: bool = False, is_unknown: bool = False) -> None:
        """The transaction is over; see ``Begun.ended``."""
        begun, self._begun = self._begun, None
        self._is_untied = False
        if begun is not None:
            begun.ended(error, rolled_back=rolled_back, is_unknown=is_unknown)

    # Inside.

    @property
    def _status(self) -> TransactionStatus:
        return TransactionStatus(self._wrapper.connection.info.transaction_status)

    @property
    def _is_test_case(self) -> bool:
        """Whether the transaction is one that Django's TestCase wraps its tests in."""
        blocks = self._wrapper.atomic_blocks
        return bool(blocks) and bool(blocks[0]._from_testcase)

    def _is_alone(self) -> bool:
        """Whether a statement would be a transaction by itself."""
        return bool(self._wrapper.connection.autocommit) and self._status is TransactionStatus.IDLE

    def _atomic(self) -> AbstractContextManager[None]:
        usual: Any = connections[self._wrapper.alias]
        if usual is not self._wrapper:
            raise ConfigurationError(
                f"the connection is a copy of that to database {self._wrapper.alias!r}, and in autocommit mode; "
                "turn it off with set_autocommit(False), and commit"
            )
        atomic: AbstractContextManager[None] = transaction.atomic(using=self._wrapper.alias)
        return atomic

    def _execute_tied(
        self, runner: Runner, run: Callable[[], Any], sql: Any = "", *, can_go_along: bool = False
    ) -> Any:
        if self._status is TransactionStatus.IDLE and is_set_transaction(sql) and not self._is_alone():
            self._telling.told(runner)  # it is refused where the next would be
            self._telling.change_hands(runner)
            self._is_untied = True
            return run()
        context = runner.context
        commits = is_commit(sql) or self._is_alone()
        try:
            with nullcontext() if context is None else noted(context, runner.user_id, self._wrapper.connection):
                result = self._run_tied(runner, run, can_go_along)
        except BaseException as error:
            self._notice_end(sql, error, commits=commits)
            raise
        self._notice_end(sql, None, commits=commits)
        return result

    def _run_tied(self, runner: Runner, run: Callable[[], Any], can_go_along: bool) -> Any:
        if self._is_test_case:
            self._tell_test_case(runner)
        elif not self._goes_on_for(runner):
            return self._begin(runner, run, can_go_along)
        if self._begun is not None:
            self._begun.count()
        return run()

    def _notice_end(self, sql: Any, error: BaseException | None, *, commits: bool) -> None:
        """A statement by itself is over, and so is a transaction by COMMIT or ROLLBACK, or with its connection."""
        if self._begun is None:
            return
        status = self._status
        if status in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            # Whoever is interrupted has not looked at the answer.
            is_answered = error is None or (status is TransactionStatus.IDLE and isinstance(error, Exception))
            self.ended(error, rolled_back=is_rollback(sql), is_unknown=commits and not is_answered)

    def _goes_on_for(self, runner: Runner) -> bool:
        """Whether a transaction is under way that is tied to who the statement runs for; False where one begins."""
        begun = self._begun
        status = self._status
        if begun is not None and (begun.connection is not self._wrapper.connection or status is TransactionStatus.IDLE):
            self.ended(rolled_back=True)  # on the driver's connection, unseen
            begun = None
        if begun is None:
            if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR) and not self._is_untied:
                raise ConfigurationError(
                    f"a transaction on database {self._wrapper.alias!r} was begun on the driver's own connection "
                    "(connection.connection), where nothing ties it to a user; begin it with transaction.atomic()"
                )
            return False
        if not runner.runs_as(begun.runner):
            if not self._give_up():
                raise CrossUserAccessError(
                    f"the transaction on database {self._wrapper.alias!r} was begun for somebody else; "
                    "end it first, and begin a new one in this context"
                )
            return False
        if begun.failure is not None:
            raise transaction.TransactionManagementError(
                f"the transaction on database {self._wrapper.alias!r} could not be tied to its user; roll it back"
            ) from begun.failure
        return True

    def _give_up(self) -> bool:
        """Roll back what a context has left open that is over. False where its code may still go on with it."""
        if self._wrapper.in_atomic_block or self._refusal_of_context() is None:
            return False
        self._wrapper.rollback()
        return True

    def _tell_test_case(self, runner: Runner) -> None:
        # The tests of a class share one transaction, and its savepoints take the setting back: it is told each time.
        if self._status is TransactionStatus.INERROR:
            return  # nothing is answered any more until a savepoint is rolled back to
        with self._wrapper.wrap_database_errors:
            self._telling.send(self._telling.told(runner))

    def _begin(self, runner: Runner, run: Callable[[], Any], can_go_along: bool) -> Any:
        """Begin a transaction: tie it, and run its first statement. With ``can_go_along`` both are sent together, which
        costs no round trip more than the statement.
        """
        told = self._telling.told(runner)
        if not self._is_untied:
            self._telling.change_hands(runner)
        self._begun = begun = self._record(runner)
        self._is_untied = False
        try:
            # What a pipeline sends between two syncs is one transaction, also without BEGIN.
            with self._wrapper.wrap_database_errors, self._telling.together(told, with_statement=can_go_along):
                begun.binding = self._telling.send(told)
                if can_go_along:
                    begun.count()
                    return run()
            self._bind_session(runner)
        except BaseException as error:
            if not can_go_along or not begun.was_told:
                begun.failure = error
            raise
        begun.count()
        return run()

    def _record(self, runner: Runner) -> Begun:
        log = None
        if runner.context is not None:
            log = TransactionLog(runner.context, self._wrapper.alias, **self._telling.binding.about)
            log.begin()
        return Begun(runner, self._wrapper.connection, log)

    def _bind_session(self, runner: Runner) -> None:
        if runner.context is None or runner.user_id is None:
            return
        self._is_binding = True
        try:
            runner.context.bind_session(self._wrapper)
        finally:
            self._is_binding = False


def _configured() -> Sequence[str]:
    """The aliases of the project; Django makes and drops the databases of tests under another one."""
    return tuple(connections.settings)


def _has_other_binders(runner: Runner) -> bool:
    """Whether plugins tie the connection, too, which they do with statements of their own."""
    context = runner.context
    return context is not None and context.host is not None and bool(context.host.hooks.bind_session)
