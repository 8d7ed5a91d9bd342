"""What wrap_handler makes of a handler for websockets.sync.server: a thread for each connection."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import Context
from functools import partial
from inspect import isawaitable
from typing import Any, cast

from starlette.requests import HTTPConnection
from websockets.http11 import Response
from websockets.sync.server import ServerConnection

from ucm_middleware.admission import REFUSED, Admission, Refused
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ConfigurationError, LedgerUnavailableError
from ucm_middleware.identity import Identified, Identify
from ucm_middleware.manager import UserContextManager
from ucm_middleware.refusal import refusal_for
from ucm_middleware.settings import require_kind
from ucm_middleware.types import Scope
from ucm_middleware.websocket.limits import MAX_MESSAGE_SIZE, MESSAGE_RATE, MessageLimits
from ucm_middleware.websocket.origins import Origins
from ucm_middleware.websocket.websockets.handshake import WITHOUT_CONNECTIONS, refusal_response
from ucm_middleware.websocket.websockets.sync_connection import UserConnection

Handler = Callable[[ServerConnection], None]


class SyncHandler:
    """What ``wrap_handler`` makes of a plain function."""

    def __init__(
        self,
        handler: Handler,
        *,
        manager: UserContextManager,
        identify: Identify | None = None,
        require_identity: bool = False,
        ttl: float | None = None,
        allowed_origins: Sequence[str] = (),
        max_message_size: int = MAX_MESSAGE_SIZE,
        message_rate: float | None = MESSAGE_RATE,
        context_per_message: bool = False,
    ) -> None:
        require_kind("manager", manager, UserContextManager, "UserContextManager()")
        wrapping = (*manager.hooks.around_context, *manager.hooks.around_message)
        if wrapping:
            raise ConfigurationError(
                f"{wrapping[0]} wraps contexts or messages, which needs an event loop, and the handler is a plain "
                "function: make it asynchronous and serve it with websockets.asyncio.server, or leave the plugin out"
            )
        self.handler = handler
        self.manager = manager
        self.limits = MessageLimits(max_message_size, message_rate)
        self.context_per_message = context_per_message
        self._identify = identify
        self._admission = Admission(manager, identify, require_identity, ttl)
        self._origins = Origins(allowed_origins)
        manager.serve()

    @property
    def create_connection(self) -> type[ServerConnection]:
        """For ``serve(create_connection=...)``."""
        return cast("type[ServerConnection]", partial(UserConnection, self))

    def __call__(self, connection: ServerConnection) -> None:
        if not isinstance(connection, UserConnection) or connection.wrapped is not self:
            raise ConfigurationError(WITHOUT_CONNECTIONS)
        connection.run()

    def admit(self, scope: Scope, variables: Context) -> UserExecutionContext | Response:
        """Open a context for whom the handshake comes from. Returns the answer where that is refused."""
        try:
            self.manager._trail.wait_for_room()
            self._origins.require(scope["headers"], is_secure=scope["scheme"] == "wss")
            context = self._admission.open_for(self._found(HTTPConnection(scope)), variables, websocket=True)
        except REFUSED as error:
            return self._refused(error)
        try:
            self.manager._trail.settle()
        except LedgerUnavailableError as error:
            context.close("failed", error)
            return self._refused(error)
        return context

    def _found(self, connection: HTTPConnection) -> Identified:
        found = None if self._identify is None else self._identify(connection)
        if found is not None and isawaitable(found):
            found = _at_once(found)
        if found is None and self.manager.hooks.identify:
            found = _at_once(self.manager.hooks.identify(connection))
        return found

    def _refused(self, error: Refused) -> Response:
        refusal = self._admission.refused(error)
        try:
            self.manager._trail.settle()
        except LedgerUnavailableError as unavailable:
            refusal = refusal_for(unavailable) or refusal
        return refusal_response(refusal)


def _at_once(identifying: Awaitable[Identified]) -> Identified:
    """The result of a resolver that is asynchronous and has nothing to wait for."""
    steps = cast("Generator[Any, None, Identified]", identifying.__await__())
    try:
        next(steps)
    except StopIteration as stop:
        return cast("Identified", stop.value)
    steps.close()
    raise ConfigurationError(
        "identify waits for something, and a thread of websockets.sync.server has no event loop to wait with: give a "
        "resolver that does not wait, or make the handler asynchronous and serve it with websockets.asyncio.server"
    )
