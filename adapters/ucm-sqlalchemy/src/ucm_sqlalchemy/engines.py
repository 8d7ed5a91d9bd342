"""EngineBinding: each transaction on an engine is its user's, whoever begins it, from before its first statement."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from ucm_middleware import ConfigurationError, TransactionLog, UserExecutionContext
from ucm_sqlalchemy.drivers.driver import Driver
from ucm_sqlalchemy.ownership import LEASE, Lease, owner_of, require_access

if TYPE_CHECKING:
    from ucm_postgres.mark import Mark

BEGUN: Final = "ucm_sqlalchemy.begun"
"""Where a connection's ``info`` has the transaction that is under way on it."""

IN_USE: Final = "ucm_sqlalchemy.in_use"
"""Is in the ``info`` of connections that the pool has given out, unlike those that SQLAlchemy gets to know first."""

_ENDED: Final = (
    "a statement, or the driver, has ended the transaction behind SQLAlchemy's back, or reset all settings, so that "
    "what comes after it would run for no user, and what became of its work is not known; leave its end to commit() "
    "and rollback(), and use begin_nested() for savepoints"
)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Begun:
    """A transaction: whose it is, and what is put on record of it."""

    owner: UserExecutionContext
    log: TransactionLog
    driver: Driver
    dbapi_connection: Any
    mark: "Mark | None" = None  # what shows that it is over
    is_bound: bool = False
    is_committing: bool = False
    has_failed: bool = False  # a statement, after which a server may answer COMMIT with a rollback, and say nothing
    error: BaseException | None = None
    lease: Lease | None = None
    is_lost: bool = False  # something other than SQLAlchemy has ended it
    detached: "Detached | None" = None  # where its context finds it, on a connection that was detached from its pool
    connection: "ReferenceType[Connection] | None" = None  # that which commits it, when that was detached

    def find_lost(self, *, can_ask: bool = False) -> bool:
        """Whether something other than SQLAlchemy has ended it. The end is on record as unknown then."""
        if self.is_bound and not self.is_committing and not self.is_lost:
            has_ended = self.driver.has_ended(self.dbapi_connection, self.mark)
            if has_ended is None:
                if can_ask:
                    self.has_failed = self.driver.has_failed(self.dbapi_connection)
                has_ended = not self.has_failed
            self.is_lost = has_ended
            if self.is_lost:
                self._lose(InvalidRequestError(_ENDED))
        return self.is_lost

    def end(self, error: BaseException | None = None) -> None:
        """Put the end on record: it was committed when that was asked for and nothing went wrong."""
        if self.detached is not None:
            self.detached.discard(self)
        if self.find_lost():
            return
        if self.is_committing and self.error is None and error is None:
            self.log.commit()
            if self.lease is not None:
                self.lease.has_committed = True
            return
        error = self.error or error
        if self.is_committing and error is not None and self.driver.outcome_is_unknown(error):
            self._lose(error)
        else:
            self.log.rollback(error)

    def leave(self) -> None:
        """Its context closes, and no pool knows the connection, which perhaps nobody closes."""
        connection = None if self.connection is None else self.connection()
        if self.is_committing and (connection is None or not connection.in_transaction()):
            self.end()  # that has come back
        else:
            self.driver.cut(self.dbapi_connection)
            self.end(ConnectionError("the connection was left behind"))

    def _lose(self, error: BaseException) -> None:
        self.log.lost(error)
        if self.lease is not None:
            self.lease.has_committed = True  # perhaps: it must not be done again


class Detached(set[Begun]):
    """One context's transactions on connections that were detached from their pool."""

    def close(self) -> None:
        """The context closes."""
        for begun in tuple(self):
            begun.leave()


class EngineBinding:
    """The listeners on one engine. They hold for the engines that are derived from it, and after ``dispose()``."""

    __slots__ = ("_action", "_committing", "_detached", "_driver", "_name")

    def __init__(self, engine: Engine, driver: Driver, name: str) -> None:
        self._driver = driver
        self._name = name
        self._action = f"connection to {name}"
        # What commits on a connection that the pool knows no more, by what it will name when that is closed.
        self._committing: WeakValueDictionary[int, Begun] = WeakValueDictionary()
        # By the context, which alone keeps them.
        self._detached: WeakKeyDictionary[UserExecutionContext, ReferenceType[Detached]] = WeakKeyDictionary()
        event.listen(engine, "begin", self._begin)
        event.listen(engine, "begin_twophase", self._refuse_twophase)
        event.listen(engine, "before_cursor_execute", self._statement)
        event.listen(engine, "commit", self._commit)
        event.listen(engine, "rollback", self._rollback)
        event.listen(engine, "rollback_savepoint", self._rollback_savepoint)
        event.listen(engine, "handle_error", self._failed)
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "detach", self._detach)
        event.listen(engine, "invalidate", self._invalidated)
        event.listen(engine, "reset", self._reset)

    def _begin(self, connection: Connection) -> None:
        info: dict[Any, Any] | None = None
        try:
            info = connection.info
            self._end(info)
            options = connection.get_execution_options()
            owner = owner_of(options, self._name)
            settings = self._driver.settings(owner)
            log = TransactionLog(owner, self._name, **self._driver.about)
            log.begin()
            dbapi_connection = connection.connection.dbapi_connection
            begun = info[BEGUN] = Begun(owner, log, self._driver, dbapi_connection, lease=options.get(LEASE))
            if begun.lease is not None:
                begun.lease.take(connection)
            if connection.connection.is_detached:
                self._keep(begun)
            begun.mark = self._driver.begin(connection, settings)
            begun.is_bound = True
            owner.bind_session(connection)
        except BaseException as error:
            if info is not None:
                self._end(info, error)
            # After an error in this event SQLAlchemy takes the connection for one that is beginning a transaction, for
            # ever, and lets statements through without any: so nobody may go on with it.
            if not isinstance(error, Exception):
                connection.invalidate(error)
            connection.close()
            raise

    def _refuse_twophase(self, connection: Connection, xid: Any) -> None:
        raise ConfigurationError(
            "two-phase transactions cannot be bound: there is no step between their beginning and their first "
            "statement; use begin(), or an engine of its own for them"
        )

    def _statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        info = connection.info
        begun: Begun | None = info.get(BEGUN)
        if begun is None:
            if IN_USE not in info and not connection.in_transaction():
                return  # what SQLAlchemy asks a new connection
            raise ConfigurationError(
                f"a statement for the database {self._name!r} comes before its transaction is bound to a user: by a "
                "listener for the engine's begin event that is older than the adapter (make the adapter first), or "
                "on a connection that was begun or detached behind its back (close it, and take another)"
            )
        if begun.is_bound:
            require_access(begun.owner, self._action)
            _require_under_way(begun)
            begun.log.statements += 1

    def _commit(self, connection: Connection) -> None:
        begun = _begun_on(connection)
        if begun is not None:
            require_access(begun.owner, self._action)
            _require_under_way(begun)
            if begun.has_failed or self._driver.may_have_failed(connection):
                connection.exec_driver_sql("SELECT 1")  # an error, in a transaction that the failure has ended
            # Whether it succeeds is known when the connection goes back, or begins another.
            begun.is_committing = True
            if connection.connection.is_detached:
                self._committing[id(begun.dbapi_connection)] = begun
                begun.connection = ref(connection)

    def _rollback(self, connection: Connection) -> None:
        begun = _begun_on(connection)
        if begun is not None:
            begun.find_lost(can_ask=not begun.has_failed)
            self._end(connection.info)

    def _rollback_savepoint(self, connection: Connection, name: str, context: None) -> None:
        begun = _begun_on(connection)
        if begun is not None:
            begun.has_failed = False

    def _failed(self, failure: ExceptionContext) -> None:
        begun = None if failure.connection is None else _begun_on(failure.connection)
        if begun is not None:
            begun.has_failed = True
            if begun.is_committing:
                begun.error = failure.original_exception

    def _checked_out(self, dbapi_connection: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
        record.info[IN_USE] = True
        self._driver.lend(dbapi_connection, record.info)

    def _detach(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        begun: Begun | None = record.info.pop(BEGUN, None)  # the connection has a copy
        if begun is None:
            return
        if begun.is_committing:  # which has come back
            begun.end()
            return
        try:
            self._keep(begun)
        except BaseException:  # its context has closed
            begun.leave()
            raise

    def _keep(self, begun: Begun) -> None:
        """Have it end with its context, if it does not before."""
        kept = self._detached.get(begun.owner)
        detached = None if kept is None else kept()
        if detached is None:
            detached = begun.owner.closing(Detached(), name=f"detached {self._action}s")
            self._detached[begun.owner] = ref(detached)
        begun.detached = detached
        detached.add(begun)

    def _invalidated(self, dbapi_connection: Any, record: ConnectionPoolEntry, error: BaseException | None) -> None:
        self._end(record.info, error or ConnectionError("the connection was invalidated"))

    def _reset(self, dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
        if record is None:  # it is detached, and will be closed
            begun = self._committing.pop(id(dbapi_connection), None)
            if begun is not None:
                begun.end()
            return
        self._end(record.info, ConnectionError("the connection was left behind") if state.terminate_only else None)
        if state.asyncio_safe and not state.terminate_only:
            self._driver.reset(dbapi_connection, record.info)

    @staticmethod
    def _end(info: dict[Any, Any], error: BaseException | None = None) -> None:
        begun: Begun | None = info.pop(BEGUN, None)
        if begun is not None:
            begun.end(error)


def _begun_on(connection: Connection) -> Begun | None:
    """What is under way on a connection; None on one that is closed or thrown away, whose end is on record already."""
    return None if connection.closed or connection.invalidated else connection.info.get(BEGUN)


def _require_under_way(begun: Begun) -> None:
    if begun.find_lost(can_ask=True):
        raise InvalidRequestError(_ENDED)
