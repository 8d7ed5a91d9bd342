"""Binder: ties each transaction of one of Django's connections to the user that the running code works for."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

import psycopg
from django.db import InterfaceError, connections, transaction
from psycopg.pq import ExecStatus, TransactionStatus

from ucm_django import conf
from ucm_django.identity import Hands, Runner, runner_here
from ucm_django.reset import reset_connection
from ucm_django.running import noted
from ucm_middleware import ConfigurationError, CrossUserAccessError, UserContextError
from ucm_middleware.transactions import TransactionLog
from ucm_postgres import RESET

Execute = Callable[[Any, Any, bool, dict[str, Any]], Any]
"""What Django gives an execute wrapper to go on with."""

# Nothing may be asked before it in a transaction, not even a setting, and it asks nothing itself.
_SET_TRANSACTION: Final = re.compile(r"\s*set\s+transaction\s[^;]*;?\s*", re.IGNORECASE)
_ROLLBACK: Final = re.compile(r"\s*(rollback|abort)\b", re.IGNORECASE)


class Wrapper(Protocol):
    """What is needed of Django's DatabaseWrapper for PostgreSQL."""

    alias: str
    connection: Any
    atomic_blocks: list[Any]
    in_atomic_block: bool
    settings_dict: dict[str, Any]

    @property
    def wrap_database_errors(self) -> Any: ...

    @property
    def timezone_name(self) -> Any: ...

    def configure(self, connection: Any) -> object:
        """Set on the driver's connection what Django wants there."""
        ...

    def rollback(self) -> None: ...


class Begun:
    """A transaction under way: whose it is, on which of the driver's connections, and its audit records."""

    __slots__ = ("binding", "connection", "failure", "log", "runner")

    def __init__(self, runner: Runner, connection: object, log: TransactionLog | None) -> None:
        self.runner = runner
        self.connection = connection
        self.log = log
        self.binding: psycopg.Cursor[Any] | None = None  # what the binding was sent with
        self.failure: BaseException | None = None  # why it could not be tied

    def count(self) -> None:
        """One statement more."""
        if self.log is not None:
            self.log.statements += 1

    def ended(self, error: BaseException | None = None, *, rolled_back: bool = False) -> None:
        """It is over: committed, unless there is an error or it is said that it was rolled back."""
        if self.log is None:
            return
        if error is None and not rolled_back:
            self.log.commit()
        else:
            self.log.rollback(error)


class Binder:
    """Of one DatabaseWrapper, all statements of which pass through ``execute``, ``call`` and ``tie``."""

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = wrapper
        self._binding = conf.binding()
        self._resets = conf.reset()
        self._is_off = wrapper.alias not in _configured() or wrapper.alias in conf.unbound_databases()
        self._begun: Begun | None = None
        self._hands: Hands | None = None
        self._is_binding = False
        self._is_untied = False  # a transaction was begun, and what came was SET TRANSACTION alone
        self.is_housekeeping = False
        """Whether Django does things of its own on the connection, such as savepoints."""

    def connected(self) -> None:
        """The driver's connection is a new one, or one that the pool has reset."""
        self._begun = self._hands = None
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
        is_single = not many and _is_single(sql, cursor) and not _has_other_binders(runner)
        with nullcontext() if is_single or not self._is_alone() else self._atomic():
            return self._execute_tied(runner, run, sql, is_single=is_single)

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

    def refusal_to_commit(self) -> UserContextError | None:
        """Why the transaction must not be committed: its context has ended. None when it may be."""
        begun = self._begun
        if begun is not None and begun.runner.context is not None:
            try:
                begun.runner.context.require_usable()
            except UserContextError as error:
                return error
        return None

    def ended(self, error: BaseException | None = None, *, rolled_back: bool = False) -> None:
        """The transaction is over."""
        begun, self._begun = self._begun, None
        self._is_untied = False
        if begun is not None:
            begun.ended(error, rolled_back=rolled_back)

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

    def _execute_tied(self, runner: Runner, run: Callable[[], Any], sql: Any = "", *, is_single: bool = False) -> Any:
        if self._status is TransactionStatus.IDLE and _is_set_transaction(sql) and not self._is_alone():
            runner.settings(self._binding)  # it is refused where the next would be
            self._change_hands(runner)
            self._is_untied = True
            return run()
        context = runner.context
        try:
            with nullcontext() if context is None else noted(context, runner.user_id, self._wrapper.connection):
                result = self._run_tied(runner, run, is_single)
        except BaseException as error:
            self._notice_end(sql, error)
            raise
        self._notice_end(sql, None)
        return result

    def _run_tied(self, runner: Runner, run: Callable[[], Any], is_single: bool) -> Any:
        if self._is_test_case:
            self._tell_test_case(runner)
        elif not self._goes_on_for(runner):
            return self._begin(runner, run, is_single)
        if self._begun is not None:
            self._begun.count()
        return run()

    def _notice_end(self, sql: Any, error: BaseException | None) -> None:
        """A statement by itself is over, and so is a transaction by COMMIT or ROLLBACK."""
        if self._begun is not None and self._status is TransactionStatus.IDLE:
            self.ended(error, rolled_back=isinstance(sql, str) and _ROLLBACK.match(sql) is not None)

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
        if self._wrapper.in_atomic_block or self.refusal_to_commit() is None:
            return False
        self._wrapper.rollback()
        return True

    def _tell_test_case(self, runner: Runner) -> None:
        # The tests of a class share one transaction, and its savepoints take the setting back: it is told each time.
        if self._status is TransactionStatus.INERROR:
            return  # nothing is answered any more until a savepoint is rolled back to
        with self._wrapper.wrap_database_errors:
            self._send(runner.settings(self._binding))

    def _begin(self, runner: Runner, run: Callable[[], Any], is_single: bool) -> Any:
        """Begin a transaction: tie it, and run its first statement. With ``is_single`` both are sent together, which
        costs no round trip more than the statement.
        """
        told = self._told(runner)
        self._change_hands(runner)
        self._begun = begun = self._record(runner)
        self._is_untied = False
        try:
            # What a pipeline sends between two syncs is one transaction, also without BEGIN.
            with self._wrapper.wrap_database_errors, self._together(told, is_single):
                begun.binding = self._send(told)
                if is_single:
                    begun.count()
                    return run()
            self._bind_session(runner)
        except BaseException as error:
            if not is_single or not _was_told(begun.binding):
                begun.failure = error
            raise
        begun.count()
        return run()

    # What each transaction begins with.

    def _told(self, runner: Runner) -> tuple[tuple[str, str], ...]:
        told = runner.settings(self._binding)
        if self._resets == "change":
            return told
        # What the reset takes away, and Django has set when it connected.
        role = self._wrapper.settings_dict["OPTIONS"].get("assume_role")
        kept = (("TimeZone", self._wrapper.timezone_name),)
        return (*kept, *told) if role is None else (*kept, ("role", role), *told)

    def _send(self, told: Sequence[tuple[str, str]]) -> "psycopg.Cursor[Any] | None":
        if not told:
            return None
        # Not Django's own cursors: they would make the values part of the SQL, which others can see.
        cursor = psycopg.Cursor(self._wrapper.connection)
        if self._resets == "begin":
            for statement in RESET:
                cursor.execute(statement.encode(), prepare=False)
        calls = ", ".join(["pg_catalog.set_config(%s, %s, true)"] * len(told))
        cursor.execute(f"SELECT {calls}".encode(), [text for pair in told for text in pair], prepare=False)
        return cursor

    def _together(self, told: Sequence[tuple[str, str]], is_single: bool) -> AbstractContextManager[object]:
        """Around what is to be sent in one round trip."""
        if not told or not (is_single or self._resets == "begin"):
            return nullcontext()
        pipeline: AbstractContextManager[object] = self._wrapper.connection.pipeline()
        return pipeline

    def _change_hands(self, runner: Runner) -> None:
        """Bring the connection back to a clean state, where somebody else has used it before."""
        if self._is_untied:
            return
        last, self._hands = self._hands, runner.hands
        if last is not None and not last.are(self._hands) and self._resets == "change":
            with self._wrapper.wrap_database_errors:
                reset_connection(self._wrapper.connection, self._wrapper.configure)

    def _record(self, runner: Runner) -> Begun:
        log = None
        if runner.context is not None:
            log = TransactionLog(runner.context, self._wrapper.alias)
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


def _is_set_transaction(sql: Any) -> bool:
    return isinstance(sql, str) and _SET_TRANSACTION.fullmatch(sql) is not None


def _is_single(sql: Any, cursor: Any) -> bool:
    """Whether it is one statement, that a pipeline can send, and whose result does not stay on the server."""
    return (
        psycopg.Pipeline.is_supported()
        and isinstance(sql, str)
        and ";" not in sql.rstrip("; \t\r\n")
        and not isinstance(cursor, psycopg.ServerCursor)
    )


def _has_other_binders(runner: Runner) -> bool:
    """Whether plugins tie the connection, too, which they do with statements of their own."""
    context = runner.context
    return context is not None and context.host is not None and bool(context.host.hooks.bind_session)


def _was_told(binding: "psycopg.Cursor[Any] | None") -> bool:
    result = None if binding is None else binding.pgresult
    return result is not None and ExecStatus(result.status) is ExecStatus.TUPLES_OK
