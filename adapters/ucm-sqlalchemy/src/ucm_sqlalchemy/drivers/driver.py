"""Driver: what the binding asks of a database and its driver."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sqlalchemy import Connection

from ucm_middleware import UserExecutionContext

if TYPE_CHECKING:
    from ucm_postgres.mark import Mark

Reset = Literal["return", "begin"]
"""When a connection is brought back to a clean state: on its return to the pool, or where a transaction begins."""

Settings = Sequence[tuple[str, str]]

Info = MutableMapping[Any, Any]
"""What SQLAlchemy keeps with a connection."""


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

    def has_ended(self, dbapi_connection: Any, mark: "Mark | None") -> bool | None:
        """Whether the transaction that was begun is under way no more, as far as the driver knows without asking. None
        where it may as well have failed.
        """
        ...

    def has_failed(self, dbapi_connection: Any) -> bool:
        """Ask whether the transaction that is under way has failed."""
        ...

    def may_have_failed(self, connection: Connection) -> bool:
        """Whether a statement that SQLAlchemy knows nothing of, on the driver's own connection, may have failed."""
        ...

    def begin(self, connection: Connection, settings: Settings) -> "Mark | None":
        """Begin the transaction and tell the database, in SQLAlchemy's event ``begin``. What shows that it is over."""
        ...

    def lend(self, dbapi_connection: Any, info: Info) -> None:
        """Remember what the driver's connection holds, in the pool's event ``checkout``."""
        ...

    def cut(self, dbapi_connection: Any) -> None:
        """Cut a connection off from the server, whatever is under way on it: without waiting, in whichever thread."""
        ...

    def reset(self, dbapi_connection: Any, info: Info) -> None:
        """Bring a connection back to a clean state, in the pool's event ``reset``."""
        ...
