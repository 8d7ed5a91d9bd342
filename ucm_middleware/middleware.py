"""UserContextMiddleware: a context around each HTTP request and each WebSocket connection."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextvars import ContextVar
from functools import partial
from inspect import isawaitable
from sys import getrefcount
from typing import Any, Final

from starlette.requests import HTTPConnection

from ucm_middleware.admission import REFUSED, Admission, Refused
from ucm_middleware.ambient import leave
from ucm_middleware.answers import RecordedAnswer
from ucm_middleware.audit.ledger import DurableLedger
from ucm_middleware.cluster.member import Member
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient
from ucm_middleware.disconnect import ReadAhead
from ucm_middleware.egress.answers import Request, WatchedAnswer, answer_for
from ucm_middleware.egress.connections import WatchedMessages
from ucm_middleware.egress.guard import EgressGuard
from ucm_middleware.errors import ConfigurationError, LedgerUnavailableError
from ucm_middleware.firewall import BOUNDARY, Boundary, Outside, checked_keep, is_enclosed
from ucm_middleware.identity import Identified, Identify
from ucm_middleware.leased import LeasedAnswer
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.manager import UserContextManager
from ucm_middleware.messages import Messages
from ucm_middleware.refusal import Refusal, refusal_for, refusal_for_reason, send_refusal
from ucm_middleware.settings import checked_drain_timeout, require_kind
from ucm_middleware.types import AnyASGIApp, ASGIApp, Message, Receive, Scope, Send
from ucm_middleware.websocket.asgi import AsgiConnection
from ucm_middleware.websocket.limits import MAX_MESSAGE_SIZE, MESSAGE_RATE, MessageLimits
from ucm_middleware.websocket.origins import Origins

logger = logging.getLogger(__name__)

CONTEXT: Final = "ucm_middleware.context"
"""The scope key of the context."""

_SHUT_DOWN: Final = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})


_LET_GO: Final = 4
"""References to a context that nothing but its scope holds: there under its key and in the state, and as the name and
the argument of who counts.
"""


class Watch:
    """Passes messages on, and notes the type of the one that was sent last."""

    __slots__ = ("_send", "last_sent")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.last_sent: str | None = None

    def send(self, message: Message) -> Awaitable[None]:
        self.last_sent = message["type"]
        return self._send(message)


class UserContextMiddleware:
    """Runs the app for each request and connection in a context of its own, from before the handler until after the
    last byte, background task or disconnect.

    ``manager`` defaults to one of its own. ``identify`` says who a connection comes from; without it, or when it
    answers None, the context is anonymous until the app binds it, unless ``require_identity`` refuses such requests
    with 401. ``ttl`` is the longest life of a context in seconds; the manager's when None. ``keep`` names the
    ContextVars that outer middlewares set for the request. It is safe for those that they set in every request; what is
    set in some requests only may be an earlier one's of the connection, unless ``ContextFirewall`` is outermost, around
    the outer middlewares too. With ``cancel_on_disconnect``, a request
    whose client has gone is cancelled; up to 16 messages of its body are read ahead to notice. When the
    server announces the shutdown, contexts that are still open get ``drain_timeout`` seconds more; servers announce it
    after a wait of their own, see ``UserContextManager.drain``.

    Of WebSockets: ``allowed_origins`` are the sites, besides the one that is asked, whose pages may open one with
    cookies. A message of more than ``max_message_size`` bytes, and more than ``message_rate`` messages a second in the
    long run, close the connection. With ``context_per_message``, each message is handled in a child context of its own.

    Inside of another one with the same manager, as in a mounted app, there is one context, to which the outer one's
    settings apply. What ``identify`` answers here is bound to it, which is refused with 409 where it is another user;
    ``require_identity`` and ``allowed_origins`` hold here too.
    """

    def __init__(
        self,
        app: AnyASGIApp,
        *,
        manager: UserContextManager | None = None,
        identify: Identify | None = None,
        require_identity: bool = False,
        ttl: float | None = None,
        keep: Sequence[ContextVar[Any]] = (),
        cancel_on_disconnect: bool = False,
        drain_timeout: float = 10.0,
        allowed_origins: Sequence[str] = (),
        max_message_size: int = MAX_MESSAGE_SIZE,
        message_rate: float | None = MESSAGE_RATE,
        context_per_message: bool = False,
    ) -> None:
        require_kind("manager", manager, UserContextManager, "UserContextManager()")
        self.app: ASGIApp = app
        self.manager = UserContextManager() if manager is None else manager
        self.identify = identify
        self._admission = Admission(self.manager, identify, require_identity, ttl)
        self.keep = checked_keep(keep)
        self.cancel_on_disconnect = cancel_on_disconnect
        self.drain_timeout = checked_drain_timeout(drain_timeout)
        self.context_per_message = context_per_message
        self._origins = Origins(allowed_origins)
        self.message_limits = MessageLimits(max_message_size, message_rate)
        hooks = self.manager.hooks
        self._is_shared = self.manager.cluster is not None
        self._is_wrapped = bool(hooks.around_context or hooks.around_message)
        self._census = self.manager.census
        self._ledger = self.manager._durable_ledger
        self._strict_ledger = self._ledger if self.manager.audit == "strict" else None
        self._begin = self._serve if self._ledger is None else self._serve_when_room
        self._egress = self.manager.egress
        self.manager._inspector.applications.append(app)
        self.manager.serve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await (self._lifespan(scope, receive, send) if kind == "lifespan" else self.app(scope, receive, send))
        elif BOUNDARY in scope and is_enclosed(scope):
            watch = Watch(send)
            await self._begin(scope, receive, watch.send, watch)
        else:
            boundary = Boundary()
            try:
                rest = boundary.start(self._begin, scope, receive, send, self.keep)
                if rest is not None:
                    await rest
            finally:
                boundary.context = boundary.outside = None

    def _serve_when_room(
        self, scope: Scope, receive: Receive, send: Send, sent: Outside | Watch | None = None
    ) -> Awaitable[None]:
        """The same with a durable ledger: what it cannot keep up with does not begin."""
        if self._ledger is None or self._ledger.has_room:
            return self._serve(scope, receive, send, sent)
        return self._wait_for_room(self._ledger, scope, receive, send, sent)

    async def _wait_for_room(
        self, ledger: DurableLedger, scope: Scope, receive: Receive, send: Send, sent: Outside | Watch | None
    ) -> None:
        try:
            await ledger.durable()
        except LedgerUnavailableError as error:
            await self._refuse(error, scope, send)
        else:
            await self._serve(scope, receive, send, sent)

    def _serve(
        self, scope: Scope, receive: Receive, send: Send, sent: Outside | Watch | None = None
    ) -> Awaitable[None]:
        """Open the context, and answer with what runs the app in it: a function, since few resolvers wait.

        ``sent`` knows what was sent last; where None is given, the boundary was raised here.
        """
        if sent is None:
            sent = scope[BOUNDARY].outside
            if sent is None:
                sent = Watch(send)
                send = sent.send
        if (spans := self.manager.telemetry.spans) is not None:
            outside = scope[BOUNDARY].outside
            spans.let_in(None if outside is None else outside.run)
        if CONTEXT in scope:
            if scope[CONTEXT].host is self.manager:
                return self._serve_inside(scope[CONTEXT], scope, receive, send)
            # Another manager's context: the app between the two middlewares goes on seeing its own.
            scope = {**scope, "state": dict(scope["state"])}
        try:
            if scope["type"] == "websocket":
                self._origins.require(scope["headers"], is_secure=scope.get("scheme") == "wss")
            found = None if self.identify is None else self.identify(HTTPConnection(scope))
            if self._is_shared:
                return self._serve_when_identified(found, scope, receive, send, sent)
            if type(found) is str:
                admission = self._admission
                context = admission.open(
                    admission.validated(found), scope[BOUNDARY].context, scope["type"] == "websocket"
                )
            elif found is None and self.manager.hooks.identify:
                return self._serve_when_identified(None, scope, receive, send, sent)
            elif found is not None and isawaitable(found):
                return self._serve_when_identified(found, scope, receive, send, sent)
            else:
                context = self._admission.open_for(found, scope[BOUNDARY].context, scope["type"] == "websocket")
        except REFUSED as error:
            return self._refuse(error, scope, send)
        return self._run(context, scope, receive, send, sent)

    async def _serve_inside(self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send) -> None:
        """Inside of another one with the same manager, as in a mounted app: the same context, for whom this one lets
        in.
        """
        try:
            if scope["type"] == "websocket":
                self._origins.require(scope["headers"], is_secure=scope.get("scheme") == "wss")
            found = None if self.identify is None else self.identify(HTTPConnection(scope))
            self._admission.settle(await found if isawaitable(found) else found, context)
        except REFUSED as error:
            await self._refuse(error, scope, send)
        else:
            await self.app(scope, receive, send)

    async def _serve_when_identified(
        self,
        found: Awaitable[Identified] | Identified,
        scope: Scope,
        receive: Receive,
        send: Send,
        sent: Outside | Watch,
    ) -> None:
        try:
            if found is not None and isawaitable(found):
                found = await found
            if found is None and self.manager.hooks.identify:
                found = await self.manager.hooks.identify(HTTPConnection(scope))
            # No name for the context here: it would be one reference more than the census expects.
            admission, variables, websocket = self._admission, scope[BOUNDARY].context, scope["type"] == "websocket"
            running = self._run(
                await admission.open_soon(found, variables, websocket)
                if self._is_shared
                else admission.open_for(found, variables, websocket),
                scope,
                receive,
                send,
                sent,
            )
        except REFUSED as error:
            await self._refuse(error, scope, send)
        else:
            await running

    async def _run(
        self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send, sent: Outside | Watch
    ) -> None:
        scope[CONTEXT] = context
        if "state" in scope:
            scope["state"]["user_context"] = context
        else:
            scope["state"] = {"user_context": context}
        ahead = None
        if self.cancel_on_disconnect and scope["type"] == "http":
            ahead = ReadAhead(receive, send, partial(context.close, "disconnected"))
            receive, send = ahead.receive, ahead.send
        lifetime = context._lifetime
        lifetime.run_in_current_task()
        token = ambient.set(context)
        if (telemetry := self.manager.telemetry).spans is not None:
            receive, send = telemetry.around(context, scope, receive, send)
        app_send = send  # a refusal goes past what the app may no longer say
        if self._is_shared:
            app_send = LeasedAnswer(context, send).send
        answer: RecordedAnswer | None = None
        if scope["type"] == "websocket":
            receive, app_send = self._connected(context, scope, receive, app_send)
        try:
            if self._strict_ledger is not None:
                await self._strict_ledger.durable()
            if self._is_wrapped:
                receive = await self._wrapped(context, scope, receive)
            if self._strict_ledger is not None:
                answer = RecordedAnswer(context, self.manager._trail, self._strict_ledger, scope, app_send)
                app_send = answer.send
            if self._egress is None:
                await self.app(scope, receive, app_send)
            else:
                await self._run_guarded(self._egress, context, scope, receive, app_send)
            if answer is not None:
                await answer.finish()
        except (Exception, asyncio.CancelledError) as error:
            lifetime.task = None
            cancelled = isinstance(error, asyncio.CancelledError)
            # First: a cancellation during the teardown is somebody else's.
            interrupted = lifetime.absorb_interrupt(error)
            await self._close(context, "cancelled" if cancelled else "failed", error)
            refusal = refusal_for_reason(lifetime.reason) if interrupted else refusal_for(error)
            is_known = refusal is not None
            # Who is signed out is told at once, also where the ledger cannot be written.
            if self._strict_ledger is not None and (interrupted or not cancelled) and lifetime.reason != "revoked":
                refusal = await _unrecorded(self._strict_ledger) or refusal
            told = None
            if refusal is not None:
                told = await send_refusal(refusal, scope, send, sent.last_sent)
                logger.info(
                    "%s: %s",
                    told or "broken off",
                    lifetime.reason if interrupted else error,  # no name for it: its traceback holds this frame
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )
            if not (is_known and told) and not (cancelled and interrupted):
                raise
            if interrupted and not cancelled:
                logger.warning("a handler that was cut off (%s) ended in an error", lifetime.reason, exc_info=error)
        except BaseException as error:  # the interpreter stops, or the server dropped the coroutine: nothing to await
            lifetime.task = None
            context.close("cancelled", error)
            raise
        else:
            lifetime.task = None
            if not context.end("finished"):
                lifetime.absorb_interrupt(None)
                await self._close(context, "finished", None)
        finally:
            leave(token)
            if ahead is not None:
                ahead.stop()
            is_held = False
            if self._census is not None:
                del ahead, receive, send, app_send, answer  # some of them hold the context
                is_held = getrefcount(context) != _LET_GO and self._census.count(context, scope, CONTEXT)
        if is_held and self._census is not None:
            self._census.require_nothing(context)

    async def _run_guarded(
        self, guard: EgressGuard, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the app with the egress guard between it and the server."""
        exchange = guard.exchange(context, scope)
        kind = answer_for(guard) if scope["type"] == "http" else WatchedMessages
        watched = kind(guard, context, exchange, send)
        try:
            await self.app(scope, Request(context, exchange, receive).receive, watched.send)
            if not isinstance(watched, WatchedAnswer):  # that one holds nothing back
                await watched.finish()
        finally:
            watched.tell()
            exchange.end()

    def _connected(
        self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send
    ) -> tuple[Receive, Send]:
        connection = AsgiConnection(
            context,
            self.manager._hub,
            self.message_limits,
            receive,
            send,
            scope.get("query_string", b""),
            per_message=self.context_per_message,
        )
        return connection.receive, connection.send

    async def _wrapped(self, context: UserExecutionContext, scope: Scope, receive: Receive) -> Receive:
        """Enter what plugins wrap the context with. Returns a ``receive`` that does so for messages."""
        hooks = self.manager.hooks
        await context._enter_around(hooks.around_context(context))
        if not hooks.around_message or scope["type"] != "websocket":
            return receive
        return Messages(context, hooks.around_message, receive).receive

    async def _close(self, context: UserExecutionContext, reason: CloseReason, error: BaseException | None) -> None:
        if reason == "cancelled" or context.needs_waiting:
            await context.aclose(reason, error)
        else:
            context.close(reason, error)

    async def _refuse(self, error: Refused, scope: Scope, send: Send) -> None:
        try:
            refusal = self._admission.refused(error)
        finally:
            del error  # its traceback holds this frame, where it is raised
        if self._strict_ledger is not None:
            refusal = await _unrecorded(self._strict_ledger) or refusal
        await send_refusal(refusal, scope, send, None)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.manager.serve()
                if self.manager.cluster is not None:
                    await self._require_cluster(self.manager.cluster, send)
            elif message["type"] == "lifespan.shutdown":
                # Before the app hears of it: open requests still need what the app is about to close.
                await self.manager.drain(self.drain_timeout)
            return message

        async def noted(message: Message) -> None:
            kind = message["type"]
            if kind == "lifespan.startup.complete":
                self.manager.telemetry.look()  # many applications set up their SDK in the lifespan
            elif kind in _SHUT_DOWN:  # the server may end itself by a signal then, and asks nobody
                await self.manager.all_written()
            await send(message)

        await self.app(scope, watched, noted)

    async def _require_cluster(self, member: Member, send: Send) -> None:
        """Serve nobody where the store can never work. Servers take an app that raises for one without a lifespan."""
        try:
            await member.ready()
        except ConfigurationError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise


async def _unrecorded(ledger: DurableLedger) -> Refusal | None:
    """What to answer where the end of a context cannot be made durable, None when it is."""
    try:
        await ledger.durable()
    except LedgerUnavailableError as error:
        return refusal_for(error)
    return None
