"""Connections by a DSN, whose password is in no message, whatever is wrong with it."""

import re
from typing import Any, Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ucm_middleware import ConfigurationError

_PATIENCE: Final = 10  # seconds, where the DSN says nothing of connect_timeout
_HIDDEN: Final = "***"


class Target:
    """Where a DSN leads. Raises ConfigurationError for one that cannot be read."""

    __slots__ = ("_given", "name", "where")

    def __init__(self, dsn: str) -> None:
        self._given = given = _read(dsn)
        host, port = given.get("host") or "the local socket", given.get("port") or 5432
        self.where = f"{host}:{port}"
        """The server, for messages."""
        user = f"{given['user']}@" if "user" in given else ""
        self.name = f"postgresql://{user}{given.get('host', '')}:{port}/{given.get('dbname', '')}"
        """The database, for messages: no password is in it."""

    def __repr__(self) -> str:
        return f"<Target {self.name}>"

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A connection; the DSN wins over ``options``. Raises what psycopg does: see ``reason_of``."""
        # A dict, not the DSN: what could not be read of it goes no further.
        given: dict[str, Any] = {"connect_timeout": _PATIENCE, **options, **self._given}
        return psycopg.connect(**given)

    def reason_of(self, error: psycopg.Error) -> str:
        """What psycopg or the server says, in one line. Details are left out: values are in them, and passwords."""
        said = error.diag.message_primary or str(error).strip()
        for name, value in self._given.items():
            if "password" in name and value:
                said = _without(said, value)
        return " ".join(said.split())


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection of the doctor's. Raises ConfigurationError, which says why there is none."""
    target = Target(dsn)
    try:
        return target.connect(application_name="ucm doctor")
    except psycopg.Error as error:
        raise ConfigurationError(f"no connection to {target.where}: {target.reason_of(error)}") from None


def _read(dsn: str) -> dict[str, str]:
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    except psycopg.Error:  # it quotes what it could not read, which may be the password
        given = None
    # A password with a character that ends it leaves the rest of itself in the fields behind.
    if (
        given is None
        or "@" in given.get("host", "") + given.get("dbname", "")
        or not re.fullmatch(r"[0-9,]*", given.get("port", ""))
    ):
        raise ConfigurationError(
            "the DSN cannot be read; give postgresql://USER:PASSWORD@HOST:PORT/DATABASE, without a driver's name in "
            "the scheme, and with characters such as @ : / ? # % and blanks in the password percent-encoded (%40 for "
            "@); or leave the password out and set PGPASSWORD"
        ) from None
    return given


def _without(text: str, secret: str) -> str:
    for spelling in {secret, quote(secret, safe="")}:
        text = text.replace(spelling, _HIDDEN)
    return text
