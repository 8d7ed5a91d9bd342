"""What is the same for all of PostgreSQL's drivers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, TextClause, text

from ucm_middleware import ConfigurationError, UserExecutionContext
from ucm_sqlalchemy.drivers.driver import Info, Reset, Settings

if TYPE_CHECKING:
    from ucm_postgres import Binding
    from ucm_postgres.client_state import Restore
    from ucm_postgres.mark import Mark, Reported

_RESTORE: Final = "ucm_sqlalchemy.restore"
"""Where the ``info`` of a connection that is lent has what gives it back what it held."""


class Postgres:
    """PostgreSQL, with any driver: the settings take a round trip of their own."""

    def __init__(self, binding: "Binding", reset: Reset) -> None:
        from ucm_postgres.blocks import outcome_is_unknown
        from ucm_postgres.mark import Mark
        from ucm_postgres.reset import RESET, RESET_QUERY

        self._is_unknown = outcome_is_unknown
        self._mark: Final = Mark
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

    def has_ended(self, dbapi_connection: Any, mark: "Mark | None") -> bool | None:
        raise NotImplementedError

    def has_failed(self, dbapi_connection: Any) -> bool:
        raise NotImplementedError

    def may_have_failed(self, connection: Connection) -> bool:
        raise NotImplementedError

    def begin(self, connection: Connection, settings: Settings) -> "Mark | None":
        require_transaction(connection)
        mark = self._mark(self.reports(connection.connection.dbapi_connection))
        self.bind(connection, (*settings, *mark.settings))
        mark.begun()
        return mark

    def reports(self, dbapi_connection: Any) -> "Reported":
        """What the server reports of the mark."""
        raise NotImplementedError

    def bind(self, connection: Connection, settings: Settings) -> None:
        """Begin the transaction and tell the database."""
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

    def cut(self, dbapi_connection: Any) -> None:
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


def require_transaction(connection: Connection) -> None:
    """Raise ConfigurationError in AUTOCOMMIT mode, where a setting lasts no longer than the statement that sets it."""
    dbapi_connection = connection.connection.dbapi_connection
    if dbapi_connection is not None and connection.dialect.detect_autocommit_setting(dbapi_connection):
        raise ConfigurationError(
            "the isolation level is AUTOCOMMIT, in which nothing ties a statement to its user; use another level, or "
            "an engine of its own for what must run outside of transactions"
        )
