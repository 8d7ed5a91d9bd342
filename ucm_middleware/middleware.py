"""UserContextMiddleware: a context around each HTTP request and each WebSocket connection."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextvars import ContextVar
from functools import partial
from inspect import isawaitable
from typing import Any, Final

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection

from ucm_middleware.ambient import enter, leave
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.disconnect import ReadAhead
from ucm_middleware.errors import ConfigurationError, ContextLimitError, UnauthenticatedError, UserContextError
from ucm_middleware.expiry import checked_ttl
from ucm_middleware.firewall import BOUNDARY, Boundary, is_enclosed, run_enclosed
from ucm_middleware.identity import Identified, Identify
from ucm_middleware.lifetime import CloseReason, Lifetime, State
from ucm_middleware.manager import UserContextManager, checked_drain_timeout
from ucm_middleware.messages import Messages
from ucm_middleware.principal import Principal
from ucm_middleware.refusal import refusal_for, refusal_for_reason, refusal_for_starlette, send_refusal
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

CONTEXT: Final = "ucm_middleware.context"
"""The scope key of the context."""


class UserContextMiddleware:
    """Runs the app for each request and connection in a context of its own, from before the handler until after the
    last byte, background task or disconnect.

    ``manager`` defaults to one of its own. ``identify`` says who a connection comes from; without it, or when it
    answers None, the context is anonymous until the app binds it, unless ``require_identity`` refuses such requests
    with 401. ``ttl`` is the longest life of a context in seconds; the manager's when None. ``keep`` names the
    ContextVars that outer middlewares set for the request. With ``cancel_on_disconnect``, a request
    whose client has gone is cancelled; up to 16 messages of its body are read ahead to notice. When the
    server announces the shutdown, contexts that are still open get ``drain_timeout`` seconds more; servers announce it
    after a wait of their own, see ``UserContextManager.drain``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        manager: UserContextManager | None = None,
        identify: Identify | None = None,
        require_identity: bool = False,
        ttl: float | None = None,
        keep: Sequence[ContextVar[Any]] = (),
        cancel_on_disconnect: bool = False,
        drain_timeout: float = 10.0,
    ) -> None:
        self.app = app
        self.manager = UserContextManager() if manager is None else manager
        if require_identity and identify is None and not self.manager.hooks.identify:
            raise ConfigurationError(
                "require_identity needs identify, or a plugin that identifies: without one no request could be served"
            )
        self.identify = identify
        self.require_identity = require_identity
        self.ttl = self.manager.ttl if ttl is None else checked_ttl(ttl)
        self.keep = tuple(keep)
        self.cancel_on_disconnect = cancel_on_disconnect
        self.drain_timeout = checked_drain_timeout(drain_timeout)
        self.manager.serve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await (self._lifespan(scope, receive, send) if kind == "lifespan" else self.app(scope, receive, send))
        elif is_enclosed(scope):
            await self._serve(scope, receive, send)
        else:
            await run_enclosed(self._serve, scope, receive, send, self.keep)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        outer = scope.get(CONTEXT)
        if outer is not None:
            if outer.host is self.manager:
                await self.app(scope, receive, send)
                return
            # Another manager's context: the app between the two middlewares goes on seeing its own.
            scope = {**scope, "state": dict(scope["state"])}
        try:
            context = await self._open(scope)
        except UserContextError as error:
            await self._refuse(error, scope, send)
            return
        except (HTTPException, WebSocketException) as error:
            # What people raise in a resolver; here nobody outside would turn it into an answer.
            refusal = refusal_for_starlette(error)
            self.manager.record_refusal(f"identify raised {type(error).__name__} ({refusal.status})")
            await send_refusal(refusal, scope, send, None)
            return
        await self._run(context, scope, receive, send)

    async def _open(self, scope: Scope) -> UserExecutionContext:
        user_id = seconds_left = principal = None
        if self.identify is not None:
            found = self.identify(HTTPConnection(scope))
            if isawaitable(found):
                found = await found
            principal = self._principal(found)
        if principal is None and self.manager.hooks.identify:
            principal = self._principal(await self.manager.hooks.identify(HTTPConnection(scope)))
        if principal is not None:
            user_id = principal.user_id
            seconds_left = principal.seconds_left()
        if user_id is None and self.require_identity:
            raise UnauthenticatedError("a user is required here")
        is_websocket = scope["type"] == "websocket"
        lifetime = Lifetime(
            State.UNBOUND if user_id is None else State.OPEN,
            "a WebSocket connection" if is_websocket else "an HTTP request",
        )
        boundary: Boundary = scope[BOUNDARY]
        lifetime.variables = boundary.context
        context = self.manager._open_for_connection(user_id, lifetime, self.ttl, is_websocket)
        if seconds_left is not None:
            self.manager.end_within(context, seconds_left)
        scope[CONTEXT] = context
        scope.setdefault("state", {})["user_context"] = context
        return context

    def _principal(self, found: Identified) -> Principal | None:
        if found is None or isinstance(found, Principal):
            return found
        if not isinstance(found, str):  # pyright: ignore[reportUnnecessaryIsInstance] - resolvers are not all typed
            raise ConfigurationError(
                f"{getattr(self.identify, '__qualname__', self.identify)} answered with a {type(found).__name__}; "
                "a resolver answers with a Principal, a user id as text, or None"
            )
        return Principal(found)

    async def _run(self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send) -> None:
        if self.cancel_on_disconnect and scope["type"] == "http":
            ahead = ReadAhead(receive, send, partial(context.close, "disconnected"))
            try:
                await self._run_app(context, scope, ahead.receive, ahead.send)
            finally:
                ahead.stop()
        else:
            await self._run_app(context, scope, receive, send)

    async def _run_app(self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send) -> None:
        last_sent: str | None = None

        def watched(message: Message) -> Awaitable[None]:
            nonlocal last_sent
            last_sent = message["type"]
            return send(message)

        hooks = self.manager.hooks
        lifetime = context.lifetime
        lifetime.run_in_current_task()
        token = enter(context)
        try:
            if hooks.around_context:
                await context._enter_around(hooks.around_context(context))
            if hooks.around_message and scope["type"] == "websocket":
                receive = Messages(context, hooks.around_message, receive).receive
            await self.app(scope, receive, watched)
        except (Exception, asyncio.CancelledError) as error:
            lifetime.task = None
            cancelled = isinstance(error, asyncio.CancelledError)
            interrupted = lifetime.absorb_interrupt()  # first: a cancellation during the teardown is somebody else's
            await self._close(context, "cancelled" if cancelled else "failed", error)
            refusal = refusal_for_reason(lifetime.reason) if interrupted else refusal_for(error)
            answered = refusal is not None and await send_refusal(refusal, scope, send, last_sent)
            if not answered and not (cancelled and interrupted):
                raise
            if interrupted and not cancelled:
                logger.warning("a handler that was cut off (%s) ended in an error", lifetime.reason, exc_info=error)
        except BaseException as error:  # the interpreter stops, or the server dropped the coroutine: nothing to await
            lifetime.task = None
            context.close("cancelled", error)
            raise
        else:
            lifetime.task = None
            lifetime.absorb_interrupt()
            await self._close(context, "finished", None)
        finally:
            leave(token)

    async def _close(self, context: UserExecutionContext, reason: CloseReason, error: BaseException | None) -> None:
        if context.needs_waiting:
            await context.aclose(reason, error)
        else:
            context.close(reason, error)

    async def _refuse(self, error: UserContextError, scope: Scope, send: Send) -> None:
        refusal = refusal_for(error)
        if refusal is None:
            raise error
        logger.info("refused with %d: %s", refusal.status, error)
        if not isinstance(error, ContextLimitError):  # that one is on record already, in the user's own trail
            self.manager.record_refusal(str(error))
        await send_refusal(refusal, scope, send, None)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.manager.serve()
            elif message["type"] == "lifespan.shutdown":
                # Before the app hears of it: open requests still need what the app is about to close.
                await self.manager.drain(self.drain_timeout)
            return message

        await self.app(scope, watched, send)
