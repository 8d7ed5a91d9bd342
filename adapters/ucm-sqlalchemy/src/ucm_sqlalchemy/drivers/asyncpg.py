"""asyncpg, through SQLAlchemy's adapted connection."""

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection
from sqlalchemy.util import await_

from ucm_sqlalchemy.drivers.driver import Settings
from ucm_sqlalchemy.drivers.postgres import Postgres

if TYPE_CHECKING:
    from ucm_postgres.client_state import Restore

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
