"""The URL of a store, and what it may say. No message here repeats a value of it: it may be a password."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ucm_middleware import ConfigurationError

FORM: Final = "valkey://[user:password@]host[:port][/database][?cluster=true]"
SCHEMES: Final = {"valkey": False, "valkeys": True, "redis": False, "rediss": True}
"""Each scheme, and whether it is of TLS."""

FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""Options that name a file, as both libraries call them."""

DEFAULT_PORT: Final = 6379


@dataclass(frozen=True, slots=True)
class Target:
    """Where a store is, and whom it is asked as. ``files`` are options of TLS, by name."""

    scheme: str
    host: str
    port: int
    database: int = 0
    is_cluster: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    files: tuple[tuple[str, str], ...] = ()

    @property
    def has_tls(self) -> bool:
        """Whether the server proves who it is, and nobody on the way can read what is said."""
        return SCHEMES[self.scheme]


def target_of(url: str) -> Target:
    """Read a URL. Raises ConfigurationError, which names the part that cannot be taken."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _wrong("its host or port cannot be read; special characters of a password must be %-encoded") from None
    if parts.scheme not in SCHEMES:
        raise _wrong(f"its scheme must be one of {', '.join(SCHEMES)}")
    if not parts.hostname:
        raise _wrong("it names no host")
    if parts.fragment:
        raise _wrong("it has a '#' in it, which must be written %23")
    if port == 0:
        raise _wrong("its port must be 1 to 65535")
    is_cluster, files = _options(parts)
    database = _database(parts.path)
    if is_cluster and database:
        raise _wrong("a cluster has no databases but 0: leave the path out")
    return Target(
        parts.scheme,
        parts.hostname,
        port or DEFAULT_PORT,
        database,
        is_cluster,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        files,
    )


def _database(path: str) -> int:
    number = path.strip("/")
    if not number:
        return 0
    if not (number.isascii() and number.isdigit() and len(number) < 6):
        raise _wrong("its path must be the number of a database, such as /0")
    return int(number)


def _options(parts: SplitResult) -> tuple[bool, tuple[tuple[str, str], ...]]:
    is_cluster = False
    files: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "cluster" and value in ("true", "false"):
            is_cluster = value == "true"
        elif name == "cluster":
            raise _wrong("its option cluster must be true or false")
        elif name not in FILES:
            raise _wrong(f"it has an option that is not known; there are cluster, {', '.join(FILES)}")
        elif not SCHEMES[parts.scheme]:
            raise _wrong(f"its option {name} is for TLS: begin it with {parts.scheme}s://")
        elif not Path(value).is_file():
            raise _wrong(f"its option {name} names no file that can be found")
        else:
            files[name] = value
    if ("ssl_certfile" in files) != ("ssl_keyfile" in files):
        raise _wrong("its options ssl_certfile and ssl_keyfile belong together")
    return is_cluster, tuple(files.items())


def _wrong(rule: str) -> ConfigurationError:
    return ConfigurationError(f"cluster: the url is not shown, since it may have a password in it; {rule}: {FORM}")
