"""A database that is told nothing of the user, such as SQLite."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from ucm_middleware import UserExecutionContext
from ucm_sqlalchemy.drivers.driver import Info, Settings


class Unbound:
    """A database that is told nothing of the user, such as SQLite."""

    @property
    def about(self) -> Mapping[str, object]:
        return {}

    def settings(self, context: UserExecutionContext) -> Settings:
        return ()

    def outcome_is_unknown(self, error: BaseException) -> bool:
        return False

    def has_ended(self, dbapi_connection: Any, mark: object) -> bool | None:
        return False

    def has_failed(self, dbapi_connection: Any) -> bool:
        return False

    def may_have_failed(self, connection: Connection) -> bool:
        return False

    def begin(self, connection: Connection, settings: Settings) -> None:
        """Leave it to the driver."""

    def lend(self, dbapi_connection: Any, info: Info) -> None:
        """Leave it as it is: the connection to a user's file is not lent again."""

    def cut(self, dbapi_connection: Any) -> None:
        """Leave it to whoever has it: there is no server."""

    def reset(self, dbapi_connection: Any, info: Info) -> None:
        """Leave it to the pool, which rolls back."""
