"""A handshake of the websockets library as ASGI has it, and an answer of ASGI as the library has it."""

import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

from websockets.asyncio.server import ServerConnection as AsyncioConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection as SyncConnection

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.refusal import Refusal, http_answer
from ucm_middleware.types import Scope

logger = logging.getLogger(__name__)

SWITCHING_PROTOCOLS: Final = 101

WITHOUT_CONNECTIONS: Final = (
    "the handler is served without its connections, so nobody was identified: give serve(...) "
    "create_connection=handler.create_connection, of the very handler that wrap_handler returned"
)


def wrong_server(kind: str, server: str) -> ConfigurationError:
    """The error to raise where a handler is served by the other kind of server. It is logged: not every server tells
    of what its connections raise.
    """
    error = ConfigurationError(f"the handler is {kind}: serve it with {server}")
    logger.error("%s", error)
    return error


def scope_of(connection: AsyncioConnection | SyncConnection, request: Request) -> Scope:
    """What resolvers see: path, query, headers and addresses."""
    path, _, query = request.path.partition("?")
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers.raw_items()]
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": request.protocol.removeprefix("HTTP/"),
        "scheme": "wss" if _is_encrypted(connection) else "ws",
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "root_path": "",
        "query_string": query.encode("ascii"),
        "headers": headers,
        "client": _address(connection, "remote_address"),
        "server": _address(connection, "local_address"),
        "subprotocols": _listed(value for name, value in headers if name == b"sec-websocket-protocol"),
        "extensions": {"websocket.http.response": {}},
    }


def response_of(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Response:
    """The answer to a handshake that is refused. It ends the connection."""
    fields = Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
    fields.setdefault("Connection", "close")
    fields.setdefault("Content-Length", str(len(body)))
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return Response(status, phrase, fields, body)


def refusal_response(refusal: Refusal) -> Response:
    """The same, of a refusal."""
    headers, body = http_answer(refusal)
    return response_of(refusal.status, headers, body)


def limit_size(protocol: ServerProtocol, most: int) -> None:
    """Let no message be more bytes than that, or than ``serve`` was told: counted as its frames arrive."""
    declared = protocol.max_message_size
    protocol.max_message_size = most if declared is None else min(most, declared)


def _is_encrypted(connection: AsyncioConnection | SyncConnection) -> bool:
    if isinstance(connection, AsyncioConnection):
        return connection.transport.get_extra_info("ssl_object") is not None
    return hasattr(connection.socket, "getpeercert")  # an SSLSocket, without an import of ssl


def _address(connection: AsyncioConnection | SyncConnection, name: str) -> tuple[str, int] | None:
    """Host and port; None of a Unix socket, and where the client has gone already."""
    try:
        address: Any = getattr(connection, name)
    except OSError:
        return None
    return cast("tuple[str, int]", address[:2]) if isinstance(address, tuple) else None


def _listed(values: Iterable[bytes]) -> list[str]:
    return [name.strip() for value in values for name in value.decode("latin-1").split(",")]
