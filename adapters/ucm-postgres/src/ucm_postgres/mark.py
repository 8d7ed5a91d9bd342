"""What shows, without a question to the server, that a transaction is over though another is under way by then.

PostgreSQL, from 14 on, reports a few settings by itself whenever they change. One of them is turned over for the
transaction alone: where that ends, the server reports it as it was. It says how later transactions begin, and so
nothing to this one.
"""

from collections.abc import Callable
from typing import Any, Final

SETTING: Final = "default_transaction_read_only"

_OTHER: Final = {"on": "off", "off": "on"}

Reported = Callable[[], str | None]
"""What the server has said last of the setting; None where it says nothing, or is gone."""


class Mark:
    """The mark of one transaction: sent with what binds it, and gone with it."""

    __slots__ = ("_reported", "_told")

    def __init__(self, reported: Reported) -> None:
        self._reported = reported
        self._told = _OTHER.get(reported() or "")

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What to set, for the transaction alone; nothing where nothing would be reported."""
        return () if self._told is None else ((SETTING, self._told),)

    def begun(self) -> None:
        """It is set. A pooler may have reported what another server said: then it is no mark."""
        if self._reported() != self._told:
            self._told = None

    def is_gone(self) -> bool:
        """Whether it was taken back: with a transaction that has ended, or failed, or by RESET ALL, user and all."""
        return self._told is not None and self._reported() not in (self._told, None)


def psycopg_reported(connection: Any) -> Reported:
    """Of psycopg's connection."""
    pgconn, name = connection.pgconn, SETTING.encode()

    def reported() -> str | None:
        value: bytes | None = pgconn.parameter_status(name)
        return None if value is None else value.decode()

    return reported


def asyncpg_reported(connection: Any) -> Reported:
    """Of asyncpg's connection. It can be asked after that was given back."""
    settings = connection.get_settings()

    def reported() -> str | None:
        value: str | None = getattr(settings, SETTING, None)
        return value

    return reported
