"""What redis-py and valkey-py have in common, and how their errors are told apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol, cast

from ucm_middleware import ConfigurationError
from ucm_valkey.errors import CacheUnavailableError, Reason

_CODE: Final = re.compile(r"[A-Z][A-Z0-9_]{1,31}(?= |$)")
BY_CODE: Final[dict[str, Reason]] = {
    "NOPERM": "refused",
    "READONLY": "read-only",
    "OOM": "memory",
    "LOADING": "loading",
    "MASTERDOWN": "loading",
    "NOAUTH": "login",
    "WRONGPASS": "login",
}
# The libraries cut the code off and raise a class of their own in its place.
CODES: Final = {
    "NoPermissionError": "NOPERM",
    "ReadOnlyError": "READONLY",
    "OutOfMemoryError": "OOM",
    "BusyLoadingError": "LOADING",
    "MasterDownError": "MASTERDOWN",
    "ExecAbortError": "EXECABORT",
    "AuthenticationError": "WRONGPASS",
}


LONGEST: Final = 1e12
"""Seconds: about as many as a server can count, in milliseconds since 1970, with a margin."""


class Pool(Protocol):
    """What is used of a pool of connections. Of an asynchronous one, both return awaitables."""

    connection_kwargs: dict[str, Any]

    def get_connection(self, *arguments: Any) -> Any: ...
    def release(self, connection: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that the server answered one command with."""

    code: str

    def error(self) -> CacheUnavailableError:
        """What to raise for it."""
        return CacheUnavailableError(BY_CODE.get(self.code, "error"), self.code)


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two, with the exceptions that its connections raise."""

    name: str
    base: type[Exception]
    response: type[Exception]
    authentication: type[Exception]
    connection: type[Exception]
    timeout: type[Exception]

    @property
    def checkout(self) -> Sequence[str]:
        """What ``get_connection`` takes: valkey-py wants the name of a command, redis-py warns of one."""
        return () if self.name == "redis" else ("cache",)

    @property
    def checks_connections(self) -> bool:
        """Whether the pool sees to it that a connection is open and has nothing to be read.

        redis-py does not, unless the notices of maintenance are switched off that a server may send at any time.
        """
        return self.name == "valkey"

    def fault(self, error: Exception) -> Fault:
        """A server's answer, by its code alone."""
        for kind in type(error).__mro__:
            if kind.__name__ in CODES:
                return Fault(CODES[kind.__name__])
        found = _CODE.match(str(error))
        return Fault(found[0] if found else "ERR")

    def unavailable(self, error: Exception) -> CacheUnavailableError:
        """What to raise for an exception of a connection."""
        if isinstance(error, self.timeout | TimeoutError):
            return CacheUnavailableError("timeout")
        if isinstance(error, self.authentication | self.response) or self.fault(error).code in BY_CODE:
            return self.fault(error).error()
        return CacheUnavailableError("down")


def pool_of(source: object, field: str, *, asynchronous: bool) -> tuple[Pool, Library]:
    """The pool that a client has, or that ``source`` is. Raises ConfigurationError for anything else."""
    pool = getattr(source, "connection_pool", source)
    wanted = f"{'redis.asyncio' if asynchronous else 'redis'} or {'valkey.asyncio' if asynchronous else 'valkey'}"
    for kind in type(pool).__mro__:
        module = kind.__module__
        name = module.partition(".")[0]
        if name in ("redis", "valkey") and module.endswith(".connection"):
            if (".asyncio." in module) is not asynchronous:
                break
            return cast(Pool, pool), _library(name)
    raise ConfigurationError(
        f"{field} is a {type(source).__name__}, which is neither a client nor a connection pool of {wanted}; give one, "
        f"such as BlockingConnectionPool.from_url(url, max_connections=10); clusters are not served"
    )


def shared_types(library: Library) -> list[type]:
    """What users share by design of the library: pools of connections, and what those have in common."""
    pools: list[type] = [import_module(f"{library.name}{kind}.connection").ConnectionPool for kind in ("", ".asyncio")]
    if library.name == "valkey":
        return pools
    notices = import_module("redis.maint_notifications")
    return [
        *pools,
        import_module("redis.himport").HImportRegistry,
        notices.MaintNotificationsConfig,
        notices.MaintNotificationsPoolHandler,
        import_module("redis.asyncio.maint_notifications").AsyncMaintNotificationsPoolHandler,
    ]


def _library(name: str) -> Library:
    errors = import_module(f"{name}.exceptions")
    return Library(
        name,
        base=getattr(errors, "RedisError" if name == "redis" else "ValkeyError"),
        response=errors.ResponseError,
        authentication=errors.AuthenticationError,
        connection=errors.ConnectionError,
        timeout=errors.TimeoutError,
    )
