"""A connection by a DSN, whose password is in no message, whatever is wrong with it."""

import re
from typing import Any, Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ucm_middleware import ConfigurationError

_PATIENCE: Final = 10  # seconds, where the DSN says nothing of connect_timeout
_HIDDEN: Final = "***"


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection. Raises ConfigurationError, which says why there is none, and holds no part of a password."""
    given = _read(dsn)
    where = f"{given.get('host') or 'the local socket'}:{given.get('port') or 5432}"
    # A dict, not the DSN: what could not be read of it goes no further.
    options: dict[str, Any] = {"connect_timeout": _PATIENCE, "application_name": "ucm doctor", **given}
    try:
        return psycopg.connect(**options)
    except psycopg.Error as error:
        secrets = [value for name, value in given.items() if "password" in name and value]
        reason = _hidden(str(error).strip(), secrets)
        raise ConfigurationError(f"no connection to {where}: {reason}") from None


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


def _hidden(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        for spelling in {secret, quote(secret, safe="")}:
            text = text.replace(spelling, _HIDDEN)
    return text
