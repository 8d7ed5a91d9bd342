"""Connections of websockets.asyncio.server.

Each of them goes through UserContextMiddleware, in a task of its own that the library's task for the connection waits
for: the handshake is answered with what the middleware says, and the handler is the application.
"""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from functools import partial
from typing import Any, Final, Unpack, cast

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.typing import Data

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ConfigurationError, UserContextError
from ucm_middleware.manager import UserContextManager
from ucm_middleware.middleware import CONTEXT, UserContextMiddleware
from ucm_middleware.refusal import close_reason, refusal_for
from ucm_middleware.types import Message, Receive, Scope, Send
from ucm_middleware.websocket.asgi import require_not_cut_off
from ucm_middleware.websocket.websockets.guarded import Outgoing
from ucm_middleware.websocket.websockets.handshake import (
    SWITCHING_PROTOCOLS,
    WITHOUT_CONNECTIONS,
    limit_size,
    response_of,
    scope_of,
    wrong_server,
)
from ucm_middleware.websocket.websockets.settings import Settings

logger = logging.getLogger(__name__)

Handler = Callable[[ServerConnection], Awaitable[None]]
ProcessRequest = Callable[[ServerConnection, Request], Awaitable[Response | None] | Response | None]

CONNECTION: Final = "ucm_middleware.websockets.connection"
"""The scope key of the connection."""


class AsyncioHandler:
    """What ``wrap_handler`` makes of an asynchronous handler."""

    def __init__(self, handler: Handler, *, manager: UserContextManager, **settings: Unpack[Settings]) -> None:
        self._handler = handler
        self.middleware = UserContextMiddleware(self._serve, manager=manager, **settings)

    @property
    def create_connection(self) -> type[ServerConnection]:
        """For ``serve(create_connection=...)``."""
        return cast("type[ServerConnection]", partial(UserConnection, self))

    def __call__(self, connection: ServerConnection) -> Awaitable[None]:
        if not isinstance(connection, UserConnection) or connection.wrapped is not self:
            raise ConfigurationError(WITHOUT_CONNECTIONS)
        return connection.run()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: UserConnection = scope[CONNECTION]
        await connection.serve(scope[CONTEXT], self._handler, receive, send)


class UserConnection(ServerConnection):
    """A connection in a context of its own. What the handler receives and closes goes through the middleware; what it
    sends goes straight to the client.
    """

    def __init__(self, wrapped: AsyncioHandler, *args: Any, **kwargs: Any) -> None:
        if not isinstance(args[0], ServerProtocol):
            raise wrong_server("asynchronous", "websockets.asyncio.server")
        super().__init__(*args, **kwargs)
        limit_size(self.protocol, wrapped.middleware.message_limits.max_size)
        self.wrapped = wrapped
        self._task: asyncio.Task[None] | None = None
        self._answered: asyncio.Future[Response | None] = self.loop.create_future()
        self._settled = asyncio.Event()  # the handshake is through, well or not
        self._denial: Message = {}
        self._forced: Response | None = None
        self._process_request: ProcessRequest | None = None
        self._scope: Scope = {}
        self._context: UserExecutionContext | None = None
        self._source: Callable[[], Awaitable[Data]] | None = None
        self._receive: Receive | None = None
        self._send: Send | None = None

    # The handshake, in the library's task.

    async def handshake(self, process_request: ProcessRequest | None = None, *args: Any, **kwargs: Any) -> None:
        self._process_request = process_request
        try:
            await super().handshake(self._admit, *args, **kwargs)
        finally:
            if self.state is not OPEN:
                await self._abandon()

    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Let the middleware say who this is. Returns how it refuses, or what ``process_request`` answers."""
        self._scope = scope_of(self, request)
        self._scope[CONNECTION] = self
        # Made directly, not by the loop's factory: an eager one would step it inside a Context that is entered already.
        self._task = asyncio.Task(
            self.wrapped.middleware(self._scope, self._next_message, self._answer),
            loop=self.loop,
            context=Context(),
            name="ucm-middleware connection",
        )
        await asyncio.wait((self._task, self._answered), return_when=asyncio.FIRST_COMPLETED)
        if not self._answered.done():
            self._task.result()  # what it raised is logged by the library, and answered with 500
            raise RuntimeError("the context was closed during the handshake")
        return self._answered.result()

    async def _abandon(self) -> None:
        """The handshake failed after it was known who this is: nobody will call the handler."""
        task = self._task
        if task is not None and not task.done():
            context = self._scope.get(CONTEXT)
            if context is None:
                task.cancel()
            else:
                context.close("disconnected")
            self._settled.set()
            await asyncio.wait((task,))
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a connection whose handshake failed ended in an error", exc_info=error)
        self._forget()

    async def run(self) -> None:
        """Let the handler run, and wait until its context is closed."""
        self._settled.set()
        try:
            if self._task is not None:
                await self._task
        finally:
            self._forget()

    def _forget(self) -> None:
        """Let go of what refers to this connection: it is over."""
        self._scope = {}
        self._receive = self._send = None

    # The application, in the middleware's task and the connection's Context.

    async def serve(self, context: UserExecutionContext, handler: Handler, receive: Receive, send: Send) -> None:
        """Accept, unless ``process_request`` has another answer, and run the handler."""
        process_request, self._process_request = self._process_request, None
        request = self.request
        if process_request is not None and request is not None:
            response = process_request(self, request)
            if isinstance(response, Awaitable):
                response = await response
            if response is not None and response.status_code != SWITCHING_PROTOCOLS:
                await _deny(response, send)
                return
            self._forced = response
        await send({"type": "websocket.accept"})
        self._context, self._receive, self._send = context, receive, send
        try:
            await handler(self)
        except ConnectionClosed as error:
            if self.state is not OPEN:  # it is this connection that is closed, and not one of the handler's own
                await context.aclose("disconnected", error)
            raise

    # What the middleware takes for the server.

    async def _next_message(self) -> Message:
        source, self._source = self._source, None
        data = await (super().recv() if source is None else source())
        return {"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data}

    async def _answer(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.send":
            await super().send(message["text"])
        elif kind == "websocket.accept":
            self._reply(self._forced)
            await self._settled.wait()
        elif kind == "websocket.close":
            if self._answered.done():
                await self._settled.wait()
            await self._close(message["code"], message["reason"])
        elif kind == "websocket.http.response.start":
            self._denial = message
        elif kind == "websocket.http.response.body":
            self._reply(response_of(self._denial["status"], self._denial["headers"], message["body"]))

    def _reply(self, response: Response | None) -> None:
        if not self._answered.done():
            self._answered.set_result(response)

    async def _close(self, code: int, reason: str) -> None:
        """The library's close, for which it waits at most ``close_timeout`` also where the client takes nothing."""
        if self.close_timeout is None:
            await super().close(code, reason)
            return
        overdue = self.loop.call_later(self.close_timeout, self.transport.abort, context=Context())
        try:
            await super().close(code, reason)
        finally:
            overdue.cancel()

    # What the handler calls.

    async def recv(self, decode: bool | None = None) -> Any:
        return await self._received(partial(super().recv, decode))

    async def recv_streaming(self, decode: bool | None = None) -> AsyncIterator[Any]:
        fragments = super().recv_streaming(decode)
        yield await self._received(fragments.__anext__)
        async for fragment in fragments:
            yield fragment

    async def _received(self, source: Callable[[], Awaitable[Data]]) -> Data:
        if self._receive is None:
            return await source()
        self._source = source  # one at a time: the library allows no two
        message = await self._receive()
        data: Data = message["text"] if "text" in message else message["bytes"]
        return data

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        if self._context is not None:
            require_not_cut_off(self._context)
        guard = self.wrapped.middleware.manager.egress
        if guard is None or self._context is None:
            await super().send(message, text=text)
            return
        outgoing = Outgoing(guard, self._context, message)
        if not await outgoing.must_stay_soon():
            await super().send(outgoing.message, text=text)
            outgoing.was_sent()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        send, self._send = self._send, None
        if send is None:
            await self._close(code, reason)
            return
        try:
            await send({"type": "websocket.close", "code": code, "reason": reason})
        except UserContextError as error:
            if asyncio.current_task() is self._task:
                raise
            refusal = refusal_for(error)  # the server that shuts down closes in any case
            await self._close(*((code, reason) if refusal is None else (refusal.close_code, close_reason(refusal))))


async def _deny(response: Response, send: Send) -> None:
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.raw_items()
    ]
    await send({"type": "websocket.http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": bytes(response.body)})
