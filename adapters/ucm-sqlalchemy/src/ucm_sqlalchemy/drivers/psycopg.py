"""psycopg 3, synchronous and through SQLAlchemy's adapted connection."""

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection

from ucm_sqlalchemy.drivers.driver import Reset, Settings
from ucm_sqlalchemy.drivers.postgres import Postgres

if TYPE_CHECKING:
    from psycopg.pq import TransactionStatus

    from ucm_postgres import Binding
    from ucm_postgres.client_state import Restore
    from ucm_postgres.mark import Mark, Reported
    from ucm_postgres.together import Waiting

_MODES: Final = ("autocommit", "isolation_level", "read_only", "deferrable")
"""How connections begin transactions."""


class Psycopg(Postgres):
    """psycopg 3: what begins the transaction and what binds it go out together."""

    def __init__(self, binding: "Binding", reset: Reset) -> None:
        from psycopg.pq import TransactionStatus

        super().__init__(binding, reset)
        self._statuses = TransactionStatus

    def bind(self, connection: Connection, settings: Settings) -> None:
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

    def reports(self, dbapi_connection: Any) -> "Reported":
        from ucm_postgres.mark import psycopg_reported

        return psycopg_reported(self._driver_of(dbapi_connection))

    def has_ended(self, dbapi_connection: Any, mark: "Mark | None") -> bool | None:
        status = self._status(dbapi_connection)
        if status == self._statuses.INTRANS:
            return mark is not None and mark.is_gone()
        return bool(status == self._statuses.IDLE)

    def has_failed(self, dbapi_connection: Any) -> bool:
        return bool(self._status(dbapi_connection) == self._statuses.INERROR)

    def may_have_failed(self, connection: Connection) -> bool:
        return self.has_failed(connection.connection.dbapi_connection)

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

    def cut(self, dbapi_connection: Any) -> None:
        from ucm_postgres.psycopg_connection import shut_down

        driver = self._driver_of(dbapi_connection)
        shut_down(driver.pgconn)  # whoever is in the middle of something finds the line dead
        self._finish(driver)

    def _finish(self, driver: Any) -> None:
        if driver.lock.acquire(blocking=False):
            try:
                driver.pgconn.finish()
            finally:
                driver.lock.release()

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

    def _finish(self, driver: Any) -> None:
        if not driver.lock.locked():
            driver.pgconn.finish()

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
