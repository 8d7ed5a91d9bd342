"""asyncpg, through SQLAlchemy's adapted connection."""

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection
from sqlalchemy.util import await_

from ucm_sqlalchemy.drivers.driver import Settings
from ucm_sqlalchemy.drivers.postgres import Postgres

if TYPE_CHECKING:
    from ucm_postgres.client_state import Restore
    from ucm_postgres.mark import Mark, Reported

_WATCH: Final = "ucm_sqlalchemy.watch"
"""Where the ``info`` of a connection has what hears of its statements."""


class _Watch:
    """Hears from asyncpg of the statements on its own connection."""

    def __init__(self) -> None:
        self.saw_error = False

    def hear(self, query: Any) -> None:
        self.saw_error = self.saw_error or query.exception is not None


class Asyncpg(Postgres):
    """asyncpg: its prepared statements survive the reset."""

    def bind(self, connection: Connection, settings: Settings) -> None:
        super().bind(connection, settings)
        watch: _Watch = connection.info.setdefault(_WATCH, _Watch())
        watch.saw_error = False
        driver = cast("Any", connection.connection.dbapi_connection).driver_connection
        driver.add_query_logger(watch.hear)  # of which asyncpg keeps one

    def reports(self, dbapi_connection: Any) -> "Reported":
        from ucm_postgres.mark import asyncpg_reported

        return asyncpg_reported(dbapi_connection.driver_connection)

    def has_ended(self, dbapi_connection: Any, mark: "Mark | None") -> bool | None:
        driver = dbapi_connection.driver_connection
        if driver.is_closed():
            return False
        if not driver.is_in_transaction():
            return True
        return None if mark is not None and mark.is_gone() else False

    def has_failed(self, dbapi_connection: Any) -> bool:
        from asyncpg import InFailedSQLTransactionError  # type: ignore[import-untyped]

        try:
            await_(dbapi_connection.driver_connection.execute("SELECT 1"))
        except InFailedSQLTransactionError:
            return True
        return False

    def may_have_failed(self, connection: Connection) -> bool:
        # asyncpg keeps from everybody whether a transaction has failed, and lets loggers know in the loop's next turn.
        await_(asyncio.sleep(0))
        return bool(connection.info[_WATCH].saw_error)

    def remember(self, dbapi_connection: Any) -> "Restore":
        from ucm_postgres.client_state import remember_asyncpg

        return remember_asyncpg(dbapi_connection.driver_connection)

    def cut(self, dbapi_connection: Any) -> None:
        dbapi_connection.driver_connection.terminate()

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
