"""Connections of valkey-py and redis-py, and what their errors mean."""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from ucm_middleware import ConfigurationError
from ucm_valkey.cluster.faults import Failure, Fault
from ucm_valkey.cluster.urls import Target
from ucm_valkey.library import CODES

Node = tuple[str, int]
"""A host and a port."""

_REDIRECTIONS: Final = ("MOVED", "ASK")
_CODES: Final = {
    **CODES,
    "NoScriptError": "NOSCRIPT",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "TryAgainError": "TRYAGAIN",
    "ClusterDownError": "CLUSTERDOWN",
    "ClusterCrossSlotError": "CROSSSLOT",
}

_KEPT_FROM: Final = re.compile(r"(?:access|publish to) (?:a|the|(?:at least )?one of the) (key|channel)")
"""How a server says that a login may not have a key or a channel; Redis 7.0 does it in its own words."""

_IN_SCRIPT: Final = "The user executing the script can't "
"""How Redis 7.0 says it of what a script does, where later ones begin with ACL."""

_NO_ANSWERS: Final = (ValueError, RecursionError)
"""What the libraries' parsers raise for what follows no protocol at all."""


class _Settings(dict[str, Any]):
    """Arguments with a password among them, which a report of an error with local variables must not show."""

    def __repr__(self) -> str:
        return "<settings>"


@dataclass(frozen=True, slots=True)
class Wire:
    """A connection that is open, and what the server at its other end says of itself."""

    connection: Any
    run: str
    version: tuple[int, ...]
    is_clustered: bool


class Client:
    """One of the two libraries, for one target. Safe in any thread; connects to nothing itself."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.target = target
        self.timeout = timeout
        self._name = _installed(target.scheme)
        errors = import_module(f"{self._name}.exceptions")
        connections = import_module(f"{self._name}.asyncio.connection")
        self._make: Callable[..., Any] = connections.SSLConnection if target.has_tls else connections.Connection
        self._base: type[Exception] = errors.RedisError if self._name == "redis" else errors.ValkeyError
        self._cluster: type[Exception] = (
            errors.RedisClusterException if self._name == "redis" else errors.ValkeyClusterException
        )
        self._login: type[Exception] = errors.AuthenticationError
        self._protocol: type[Exception] = errors.InvalidResponse
        self.response: type[Exception] = errors.ResponseError
        self.troubles = (self._base, OSError, ssl.SSLError, *_NO_ANSWERS)
        """What a connection raises; ``response`` is among it."""

    async def connect(self, host: str, port: int) -> Wire:
        """Open a connection and ask who is there. Raises one of ``troubles``, or TimeoutError."""
        connection = self._make(**self.settings(host, port))
        try:
            async with asyncio.timeout(self.timeout):
                await connection.connect()
                await connection.send_packed_command(connection.pack_command("INFO", "server"))
                info = _fields(await connection.read_response(disable_decoding=True))
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        version = tuple(int(part) for part in info.get("redis_version", "0").split(".") if part.isdigit())
        return Wire(
            connection, info.get("run_id", ""), version, "cluster" in (info.get("redis_mode"), info.get("server_mode"))
        )

    def settings(self, host: str, port: int) -> dict[str, Any]:
        """What a connection is made with. Answers are waited for by whoever asks, so it has no timeout of its own."""
        target = self.target
        settings = _Settings(
            host=host,
            port=port,
            db=target.database,
            username=target.user,
            password=target.password,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=self.timeout,
        )
        # No CLIENT SETINFO: it is a right more, for nothing.
        settings.update({"driver_info": None} if self._name == "redis" else {"lib_name": None, "lib_version": None})
        if target.has_tls:
            settings.update(target.files, ssl_cert_reqs="required", ssl_check_hostname=True)
        return settings

    async def discover(self, nodes: Sequence[Node]) -> dict[int, Node]:
        """The node of each slot of a cluster, from the first that answers. Raises as ``connect`` does, or a Failure's
        error.
        """
        module = import_module(f"{self._name}.asyncio.cluster")
        is_redis = self._name == "redis"
        settings = self.settings("", 0)
        for name in ("host", "port", "db"):
            del settings[name]
        cluster = (module.RedisCluster if is_redis else module.ValkeyCluster)(
            startup_nodes=[module.ClusterNode(host, port) for host, port in nodes],
            require_full_coverage=False,
            dynamic_startup_nodes=False,
            ssl=self.target.has_tls,
            **({} if is_redis else {"connection_error_retry_attempts": 0}),
            **settings,
        )
        manager = cluster.nodes_manager
        try:
            async with asyncio.timeout(self.timeout):
                await manager.initialize()
            return {slot: (found[0].host, int(found[0].port)) for slot, found in manager.slots_cache.items()}
        except (self._cluster, *self.troubles, TimeoutError, IndexError) as error:
            raise self._undiscovered(error, nodes).error(is_unknown=False) from None
        finally:
            await manager.aclose()
            await manager.aclose("startup_nodes")

    def slot(self, key: str) -> int:
        """Where a key stands in a cluster."""
        slot: int = import_module(f"{self._name}.crc").key_slot(key.encode())
        return slot

    def fault(self, error: Exception) -> Fault:
        """A server's answer, by its code alone."""
        text = str(error)
        code = next((_CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _CODES), None)
        if code is None:
            first = text.partition(" ")[0]
            code = first if first.isascii() and first.isupper() and first.isalnum() else "ERR"
            if text.startswith(_IN_SCRIPT):
                code = "ACL"
        if code in _REDIRECTIONS:
            return _redirection(code, text.removeprefix(code).split())
        if code == "WRONGPASS" and "required" in text:
            code = "NOAUTH"
        about = _KEPT_FROM.search(text)
        return Fault(code, about[1] if about else "")

    def late(self, host: str, port: int, *, is_connected: bool) -> Failure:
        """A server that takes too long."""
        if is_connected:
            return Failure("timeout", f"{host}:{port} did not answer in {self.timeout:g} seconds")
        hint = "; one that speaks no TLS keeps silent, as this one does" if self.target.has_tls else ""
        return Failure("timeout", f"there was no connection to {host}:{port} in {self.timeout:g} seconds{hint}")

    def failure(self, error: BaseException, host: str, port: int) -> Failure:
        """Why a connection could not be had, or was lost."""
        where = f"{host}:{port}"
        if isinstance(error, TimeoutError) and not isinstance(error, socket.gaierror):
            return self.late(host, port, is_connected=False)
        causes = _causes(error)
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Failure(
                    "refused",
                    f"the certificate of {where} does not prove that it is {host} ({cause.verify_message}): name "
                    "who signed it with ssl_ca_certs, and the host as the certificate does",
                    is_lasting=True,
                )
            if isinstance(cause, ssl.SSLError):
                return Failure(
                    "refused",
                    f"{where} takes no TLS, or not this client ({cause.reason or 'no reason given'}): see the url's "
                    "scheme, and whether the server wants ssl_certfile and ssl_keyfile",
                    is_lasting=True,
                )
            if isinstance(cause, socket.gaierror):
                return Failure("down", f"there is no address of {host}: see its name and the resolver")
            if isinstance(cause, ConnectionRefusedError):
                return Failure("down", f"nothing listens at {where}")
        if isinstance(error, (self._protocol, *_NO_ANSWERS)):
            return Failure(
                "refused",
                f"what answers at {where} is no Valkey or Redis, or wants TLS: see the url's port and scheme",
                is_lasting=True,
            )
        fault = self.fault(error) if isinstance(error, Exception) else Fault("ERR")
        if isinstance(error, self._login):
            return Failure("login", fault.error().detail, is_lasting=True)
        if fault.code == "NOPERM":
            return Failure("refused", "the login may not use INFO or SELECT, which each connection begins with", True)
        if fault.code in ("LOADING", "MASTERDOWN"):
            return Failure("loading", f"{where} is still reading its data")
        if isinstance(error, self.response) and self.target.database and "DB index" in str(error):
            return Failure("refused", f"{where} has no database {self.target.database}", is_lasting=True)
        return Failure("down", f"the connection to {where} was lost")

    def _undiscovered(self, error: Exception, nodes: Sequence[Node]) -> Failure:
        host, port = nodes[0]
        causes = _causes(error)
        answers = [cause for cause in causes if isinstance(cause, self.response)]
        if answers:
            code = self.fault(answers[0]).code
            if code == "NOPERM":
                return Failure("refused", "the login may not use CLUSTER SLOTS", is_lasting=True)
            if code == "ERR":
                detail = f"{host}:{port} is not in a cluster: leave ?cluster=true out of the url"
                return Failure("refused", detail, is_lasting=True)
            return Failure("down", f"{host}:{port} does not tell of its cluster ({code})")
        known = (cause for cause in causes if isinstance(cause, (*self.troubles, TimeoutError)))
        return self.failure(next(known, error), host, port)


def _installed(scheme: str) -> str:
    """The library of the scheme's own name, else the other."""
    own = "valkey" if scheme.startswith("valkey") else "redis"
    other = "redis" if own == "valkey" else "valkey"
    for name in (own, other):
        try:
            import_module(f"{name}.asyncio")
        except ModuleNotFoundError:
            continue
        return name
    raise ConfigurationError(
        f"cluster: neither valkey-py nor redis-py is installed: install ucm-valkey with its extra, ucm-valkey[{own}]"
    )


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, colon, value in lines if colon}


def fields_of(info: object) -> dict[str, str]:
    """An answer to INFO, by name."""
    return _fields(info) if isinstance(info, bytes) else {}


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _redirection(code: str, words: list[str]) -> Fault:
    if len(words) != 2 or not words[0].isdigit():
        return Fault("ERR")
    host, _, port = words[1].rpartition(":")
    return Fault(code, "", int(words[0]), (host, int(port)) if port.isdigit() else None)
