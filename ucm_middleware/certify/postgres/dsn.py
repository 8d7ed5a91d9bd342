"""Where a DSN leads, and the same DSN leading to the tap."""

import os
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from ucm_middleware.errors import ConfigurationError

HOST: Final = "127.0.0.1"
_PORT: Final = 5432
_SOCKETS: Final = ("/var/run/postgresql", "/tmp")
_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_REFUSED: Final[Mapping[str, str]] = {
    "sslcert": "a client certificate cannot be handed on",
    "sslkey": "a client certificate cannot be handed on",
    "sslcrl": "revocation lists are not looked at",
    "sslcrldir": "revocation lists are not looked at",
    "service": "service files are not read; name host, port and database",
    "passfile": "it is looked up by a host that changes; give the password",
}
_REFUSED_VALUES: Final[Mapping[tuple[str, str], str]] = {
    ("channel_binding", "require"): "TLS ends at the tap, which nothing can be bound to",
    ("gssencmode", "require"): "encryption by GSSAPI is not spoken",
    ("sslnegotiation", "direct"): "TLS is asked for by the server's own protocol only",
}
_PLACE: Final = ("host", "hostaddr", "port", "requirepeer")
_SECURITY: Final = ("sslmode", "ssl", "sslrootcert", "channel_binding", "gssencmode", "sslnegotiation")

_URL: Final = re.compile(r"postgres(?:ql)?(?:\+\w+)?://")
_PAIR: Final = re.compile(r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*+)'|((?:[^\s'\\]|\\.)*+))(?=\s|$)", re.DOTALL)

_ESCAPED: Final = re.compile(r"([\\'])")
_ESCAPE: Final = r"\\\1"


@dataclass(frozen=True, slots=True)
class Target:
    """A server: at ``socket``, or at ``host`` and ``port`` where that is None. ``mode`` is libpq's ``sslmode``."""

    host: str
    port: int
    socket: str | None
    mode: str
    root: str | None

    @property
    def wants_tls(self) -> bool:
        """Whether it is asked for TLS; where it has none, ``needs_tls`` says whether that is the end of it."""
        return self.socket is None and self.mode not in ("disable", "allow")

    @property
    def needs_tls(self) -> bool:
        return self.wants_tls and self.mode != "prefer"

    def tls(self) -> ssl.SSLContext:
        """As libpq would have it. Raises ConfigurationError for certificates that cannot be read."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.mode == "verify-full"
        if not self.mode.startswith("verify") and not (self.mode == "require" and self.root):
            context.verify_mode = ssl.CERT_NONE
            return context
        if self.root == "system":
            context.load_default_certs()
            return context
        root = self.root or str(Path("~/.postgresql/root.crt").expanduser())
        try:
            context.load_verify_locations(root)
        except OSError as error:
            raise ConfigurationError(f"the database's DSN: sslrootcert {root} cannot be read: {error}") from None
        return context


@dataclass(frozen=True, slots=True)
class Dsn:
    """One, taken apart. ``before`` and ``path`` are those of a URL; of pairs ("host=... port=...") they are None."""

    before: str | None
    path: str | None
    options: tuple[tuple[str, str], ...]

    def target(self) -> Target:
        """Raises ConfigurationError for what the tap cannot do; it names the option."""
        given = dict(self.options)
        for name, why in _REFUSED.items():
            if given.get(name):
                raise ConfigurationError(f"the database's DSN: {name} cannot be used here: {why}")
        for (name, value), why in _REFUSED_VALUES.items():
            if given.get(name) == value:
                raise ConfigurationError(f"the database's DSN: {name}={value} cannot be used here: {why}")
        mode = given.get("sslmode") or given.get("ssl") or os.environ.get("PGSSLMODE") or "prefer"
        if mode not in _MODES:
            raise ConfigurationError(f"the database's DSN: sslmode must be one of {', '.join(_MODES)}, not {mode!r}")
        host = given.get("hostaddr") or given.get("host") or os.environ.get("PGHOST") or ""
        port = given.get("port") or os.environ.get("PGPORT") or str(_PORT)
        if "," in host or "," in port:
            raise ConfigurationError("the database's DSN names several hosts; give the one that is to be used")
        if not port.isdecimal():
            raise ConfigurationError(f"the database's DSN: port must be a number, not {port!r}")
        folder = host if host.startswith("/") else None if host else _folder(port)
        socket = None if folder is None else f"{folder}/.s.PGSQL.{port}"
        return Target(host or "localhost", int(port), socket, mode, given.get("sslrootcert"))

    def leading_to(self, port: int) -> str:
        """The same for a server that listens at this port of this machine, and has no TLS."""
        left = [pair for pair in self.options if pair[0] not in (*_PLACE, *_SECURITY)]
        named = {name for name, _ in self.options}
        asked = named.intersection(_SECURITY) or os.environ.get("PGSSLMODE")
        if self.before is None:
            return _pairs([*left, ("host", HOST), ("port", str(port)), ("sslmode", "disable")])
        if asked and "+pg8000" not in self.before:
            left.append(("ssl" if "ssl" in named or "+asyncpg" in self.before else "sslmode", "disable"))
        return f"{self.before}{HOST}:{port}{self.path}" + (f"?{urlencode(left, quote_via=quote)}" if left else "")


def read_dsn(text: str) -> Dsn:
    """Take apart a URL, SQLAlchemy's included, or pairs. Raises ConfigurationError for anything else; it never shows
    what was given, which may have a password in it.
    """
    scheme = _URL.match(text)
    if scheme is None:
        return Dsn(None, None, tuple(_read_pairs(text)))
    try:
        url = urlsplit(text)
        user, at, place = url.netloc.rpartition("@")
        host, port = _host_and_port(place)
    except ValueError:
        raise ConfigurationError("the database's DSN is no URL that can be read") from None
    options = {"host": host, "port": port} if host or port else {}
    options |= dict(parse_qsl(url.query, keep_blank_values=True))
    return Dsn(f"{scheme[0]}{user}{at}", url.path, tuple(options.items()))


def _host_and_port(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = place.partition(":")
    return unquote(host), port


def _read_pairs(text: str) -> Iterable[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    at = 0
    while text[at:].strip():
        pair = _PAIR.match(text, at)
        if pair is None:
            raise ConfigurationError(
                "the database's DSN is neither a URL (postgresql://user@host/name) nor pairs (host=... dbname=...)"
            )
        found.append((pair[1], re.sub(r"\\(.)", r"\1", pair[2] if pair[2] is not None else pair[3])))
        at = pair.end()
    return found


def _pairs(options: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"{name}='{_ESCAPED.sub(_ESCAPE, value)}'" for name, value in options)


def _folder(port: str) -> str | None:
    """Where libpq would look for a server, if there is one."""
    return next((folder for folder in _SOCKETS if Path(folder, f".s.PGSQL.{port}").exists()), None)
