"""What each driver does to tie a transaction of SQLAlchemy's to its user, and to reset a connection."""

import asyncio
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.util import await_

from ucm_middleware import ConfigurationError, UserExecutionContext

if TYPE_CHECKING:
    from psycopg.pq import TransactionStatus

    from ucm_postgres import Binding
    from ucm_postgres.client_state import Restore
    from ucm_postgres.together import Waiting

Reset = Literal["return", "begin"]
"""When a connection is brought back to a clean state: on its return to the pool, or where a transaction begins."""

Settings = Sequence[tuple[str, str]]

Info = MutableMapping[Any, Any]
"""What SQLAlchemy keeps with a connection."""

_RESTORE: Final = "ucm_sqlalchemy.restore"
"""Where the ``info`` of a connection that is lent has what gives it back what it held."""

_WATCH: Final = "ucm_sqlalchemy.watch"
"""Where the ``info`` of a connection of asyncpg's has what hears of its statements."""

_MODES: Final = ("autocommit", "isolation_level", "read_only", "deferrable")
"""How psycopg's connections begin transactions."""


class Driver(Protocol):
    """What the binding asks of a database and its driver."""

    @property
    def about(self) -> Mapping[str, object]:
        """What the records of each transaction say of how it is tied to its user."""
        ...

    def settings(self, context: UserExecutionContext) -> Settings:
        """What the database is told of the user. Raises before anything is asked of it."""
        ...

    def outcome_is_unknown(self, error: BaseException) -> bool:
        """Whether a commit that ended in this error may have been done all the same."""
        ...

    def has_ended(self, dbapi_connection: Any) -> bool:
        """Whether the transaction that was begun is under way no more, as far as the driver knows without asking."""
        ...

    def may_have_failed(self, connection: Connection) -> bool:
        """Whether a statement that SQLAlchemy knows nothing of, on the driver's own connection, may have failed."""
        ...

    def begin(self, connection: Connection, settings: Settings) -> None:
        """Begin the transaction and tell the database, in SQLAlchemy's event ``begin``."""
        ...

    def lend(self, dbapi_connection: Any, info: Info) -> None:
        """Remember what the driver's connection holds, in the pool's event ``checkout``."""
        ...

    def reset(self, dbapi_connection: Any, info: Info) -> None:
        """Bring a connection back to a clean state, in the pool's event ``reset``."""
        ...


class Unbound:
    """A database that is told nothing of the user, such as SQLite."""

    @property
    def about(self) -> Mapping[str, object]:
        return {}

    def settings(self, context: UserExecutionContext) -> Settings:
        return ()

    def outcome_is_unknown(self, error: BaseException) -> bool:
        return False

    def has_ended(self, dbapi_connection: Any) -> bool:
        return False

    def may_have_failed(self, connection: Connection) -> bool:
        return False

    def begin(self, connection: Connection, settings: Settings) -> None:
        """Leave it to the driver."""

    def lend(self, dbapi_connection: Any, info: Info) -> None:
        """Leave it as it is: the connection to a user's file is not lent again."""

    def reset(self, dbapi_connection: Any, info: Info) -> None:
        """Leave it to the pool, which rolls back."""


class Postgres:
    """PostgreSQL, with any driver: the settings take a round trip of their own."""

    def __init__(self, binding: "Binding", reset: Reset) -> None:
        from ucm_postgres.blocks import outcome_is_unknown
        from ucm_postgres.reset import RESET, RESET_QUERY

        self._is_unknown = outcome_is_unknown
        self._binding = binding
        self._resets_at_return = reset == "return"
        self._reset: Final[tuple[str, ...]] = RESET
        self._reset_query: Final = RESET_QUERY
        self._statements: dict[int, TextClause] = {}

    @property
    def about(self) -> Mapping[str, object]:
        return self._binding.about

    def settings(self, context: UserExecutionContext) -> Settings:
        return self._binding.settings(context)

    def outcome_is_unknown(self, error: BaseException) -> bool:
        return self._is_unknown(error)

    def has_ended(self, dbapi_connection: Any) -> bool:
        raise NotImplementedError

    def may_have_failed(self, connection: Connection) -> bool:
        raise NotImplementedError

    def begin(self, connection: Connection, settings: Settings) -> None:
        require_transaction(connection)
        self.tell(connection, settings)

    def tell(self, connection: Connection, settings: Settings) -> None:
        """Through SQLAlchemy, so that it treats errors as its own: wraps them, and throws dead connections away."""
        if not self._resets_at_return:
            self.reset_inside(connection)
        count = len(settings)
        statement = self._statements.get(count)
        if statement is None:
            calls = ", ".join(f"set_config(:name{i}, :value{i}, true)" for i in range(count))
            statement = self._statements[count] = text(f"select {calls}")
        parameters: dict[str, str] = {}
        for i, (name, value) in enumerate(settings):
            parameters[f"name{i}"], parameters[f"value{i}"] = name, value
        connection.execute(statement, parameters)

    def reset_inside(self, connection: Connection) -> None:
        """Reset at the beginning of a transaction."""
        for statement in self._reset:
            connection.exec_driver_sql(statement)

    def lend(self, dbapi_connection: Any, info: Info) -> None:
        info[_RESTORE] = self.remember(dbapi_connection)

    def remember(self, dbapi_connection: Any) -> "Restore":
        """Remember what the driver's connection holds on this side of the line."""
        raise NotImplementedError

    def reset(self, dbapi_connection: Any, info: Info) -> None:
        dbapi_connection.rollback()
        if self._resets_at_return:
            self.send_reset(dbapi_connection)
        restore: Restore | None = info.pop(_RESTORE, None)  # none for what SQLAlchemy gets to know first
        if restore is not None:
            restore()

    def send_reset(self, dbapi_connection: Any) -> None:
        """Send the reset as one query, outside of a transaction."""
        raise NotImplementedError


class _Watch:
    """Hears from asyncpg of the statements on its own connection."""

    def __init__(self) -> None:
        self.saw_error = False

    def hear(self, query: Any) -> None:
        self.saw_error = self.saw_error or query.exception is not None


class Asyncpg(Postgres):
    """asyncpg: its prepared statements survive the reset."""

    def begin(self, connection: Connection, settings: Settings) -> None:
        super().begin(connection, settings)
        watch: _Watch = connection.info.setdefault(_WATCH, _Watch())
        watch.saw_error = False
        driver = cast("Any", connection.connection.dbapi_connection).driver_connection
        driver.add_query_logger(watch.hear)  # of which asyncpg keeps one

    def has_ended(self, dbapi_connection: Any) -> bool:
        driver = dbapi_connection.driver_connection
        return not driver.is_closed() and not driver.is_in_transaction()

    def may_have_failed(self, connection: Connection) -> bool:
        # asyncpg keeps from everybody whether a transaction has failed, and lets loggers know in the loop's next turn.
        await_(asyncio.sleep(0))
        return bool(connection.info[_WATCH].saw_error)

    def remember(self, dbapi_connection: Any) -> "Restore":
        from ucm_postgres.client_state import remember_asyncpg

        return remember_asyncpg(dbapi_connection.driver_connection)

    def reset_inside(self, connection: Connection) -> None:
        first, *rest = self._reset
        connection.exec_driver_sql(first)  # with which SQLAlchemy begins the transaction
        self._send(connection.connection.dbapi_connection, "; ".join(rest))

    def send_reset(self, dbapi_connection: Any) -> None:
        self._send(dbapi_connection, self._reset_query)

    @staticmethod
    def _send(connection: Any, statements: str) -> None:
        async def send(driver: Any) -> None:
            await driver.execute(statements)

        connection.run_async(send)


class Psycopg(Postgres):
    """psycopg 3: what begins the transaction and what binds it go out together."""

    def __init__(self, binding: "Binding", reset: Reset) -> None:
        from psycopg.pq import TransactionStatus

        super().__init__(binding, reset)
        self._statuses = TransactionStatus

    def begin(self, connection: Connection, settings: Settings) -> None:
        require_transaction(connection)
        dbapi_connection = cast("Any", connection.connection.dbapi_connection)
        try:
            self._begin_at_once(dbapi_connection, settings)
        except connection.dialect.loaded_dbapi.Error as error:
            if not dbapi_connection.closed:
                if error.sqlstate is None:
                    dbapi_connection.close()  # who knows in the middle of what
                else:
                    dbapi_connection.rollback()
        else:
            return
        # Once more, one after the other. It fails again, as SQLAlchemy's error, unless something in between knows no
        # pipelines.
        self.tell(connection, settings)

    def has_ended(self, dbapi_connection: Any) -> bool:
        return bool(self._status(dbapi_connection) == self._statuses.IDLE)

    def may_have_failed(self, connection: Connection) -> bool:
        return bool(self._status(connection.connection.dbapi_connection) == self._statuses.INERROR)

    def remember(self, dbapi_connection: Any) -> "Restore":
        from ucm_postgres.client_state import remember_psycopg

        driver = self._driver_of(dbapi_connection)
        restore = remember_psycopg(driver)
        modes = {name: getattr(driver, name) for name in _MODES}

        def restore_all() -> None:
            # Those that SQLAlchemy has set itself it takes back too, but later.
            for name, mode in modes.items():
                if getattr(driver, name) != mode:
                    getattr(dbapi_connection, f"set_{name}")(mode)
            restore()

        return restore_all

    def _driver_of(self, dbapi_connection: Any) -> Any:
        return dbapi_connection

    def _status(self, dbapi_connection: Any) -> "TransactionStatus":
        return cast("TransactionStatus", self._driver_of(dbapi_connection).pgconn.transaction_status)

    def _begin_at_once(self, connection: Any, settings: Settings) -> None:
        with connection.lock:
            connection.wait(self._beginning(connection, settings))

    def _beginning(self, connection: Any, settings: Settings) -> "Waiting[None]":
        from ucm_postgres.together import together

        commands = [_begin_command(connection)]
        if not self._resets_at_return:
            commands += [statement.encode() for statement in self._reset]
        places = iter(range(1, 2 * len(settings) + 1))
        calls = ", ".join(f"set_config(${next(places)}, ${next(places)}, true)" for _ in settings)
        parameters = [part.encode(connection.info.encoding) for setting in settings for part in setting]
        statements = [*((command, ()) for command in commands), (f"select {calls}".encode(), parameters)]
        return together(connection, statements)

    def send_reset(self, dbapi_connection: Any) -> None:
        before = dbapi_connection.autocommit
        dbapi_connection.autocommit = True  # known to the client alone
        dbapi_connection.execute(self._reset_query, prepare=False)
        dbapi_connection.autocommit = before


class AsyncPsycopg(Psycopg):
    """The same through SQLAlchemy's adapted connection."""

    def _driver_of(self, dbapi_connection: Any) -> Any:
        return dbapi_connection.driver_connection

    def _begin_at_once(self, connection: Any, settings: Settings) -> None:
        async def begin(driver: Any) -> None:
            async with driver.lock:
                await driver.wait(self._beginning(driver, settings))

        connection.run_async(begin)

    def send_reset(self, dbapi_connection: Any) -> None:
        async def send(driver: Any) -> None:
            before = driver.autocommit
            await driver.set_autocommit(True)
            await driver.execute(self._reset_query, prepare=False)
            await driver.set_autocommit(before)

        dbapi_connection.run_async(send)


def _begin_command(connection: Any) -> bytes:
    """What begins a transaction with the connection's settings: SQLAlchemy puts isolation levels there."""
    words = ["BEGIN"]
    if connection.isolation_level is not None:
        words.append(f"ISOLATION LEVEL {connection.isolation_level.name.replace('_', ' ')}")
    if connection.read_only is not None:
        words.append("READ ONLY" if connection.read_only else "READ WRITE")
    if connection.deferrable is not None:
        words.append("DEFERRABLE" if connection.deferrable else "NOT DEFERRABLE")
    return " ".join(words).encode()


def driver_for(engine: Engine, binding: "Binding | None", reset: Reset) -> Driver:
    """What knows the engine's database and driver. Raises ConfigurationError for those that are not supported."""
    if reset not in ("return", "begin"):
        raise ConfigurationError(f'reset is {reset!r}; give "return", or "begin" behind a pooler such as PgBouncer')
    dialect = engine.dialect
    if dialect.name == "sqlite":
        if binding is not None:
            raise ConfigurationError(
                "binding is given, and the engine is one of SQLite, which knows no users: leave it out, and give each "
                "user a file with SQLitePerUser"
            )
        return Unbound()
    if dialect.name != "postgresql":
        raise ConfigurationError(f"the engine's database is {dialect.name}; supported are postgresql and sqlite")
    kinds: dict[tuple[str, bool], type[Postgres]] = {
        ("psycopg", False): Psycopg,
        ("psycopg", True): AsyncPsycopg,
        ("asyncpg", True): Asyncpg,
    }
    kind = kinds.get((dialect.driver, dialect.is_async))
    if kind is None:
        raise ConfigurationError(
            f"the engine's driver is {dialect.driver}; supported are postgresql+psycopg and postgresql+asyncpg"
        )
    if binding is None:
        from ucm_postgres import Binding

        binding = Binding()
    return kind(binding, reset)


def require_transaction(connection: Connection) -> None:
    """Raise ConfigurationError in AUTOCOMMIT mode, where a setting lasts no longer than the statement that sets it."""
    dbapi_connection = connection.connection.dbapi_connection
    if dbapi_connection is not None and connection.dialect.detect_autocommit_setting(dbapi_connection):
        raise ConfigurationError(
            "the isolation level is AUTOCOMMIT, in which nothing ties a statement to its user; use another level, or "
            "an engine of its own for what must run outside of transactions"
        )
