"""Connections of websockets.sync.server. What the middleware does in a task is done in the connection's thread."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient
from ucm_middleware.errors import ContextClosedError, LedgerUnavailableError
from ucm_middleware.events.channel import Connection, LastEvent
from ucm_middleware.events.outbox import ThreadOutbox
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.refusal import Refusal, close_reason, refusal_for, refusal_for_reason
from ucm_middleware.websocket.asgi import OPERATION, last_event, require_not_cut_off
from ucm_middleware.websocket.limits import Meter
from ucm_middleware.websocket.websockets.guarded import Outgoing
from ucm_middleware.websocket.websockets.handshake import (
    SWITCHING_PROTOCOLS,
    limit_size,
    refusal_response,
    scope_of,
    wrong_server,
)

if TYPE_CHECKING:
    from ucm_middleware.telemetry.spans import Traced
    from ucm_middleware.websocket.websockets.sync_server import SyncHandler

logger = logging.getLogger(__name__)

ProcessRequest = Callable[[ServerConnection, Request], Response | None]


class UserConnection(ServerConnection):
    """A connection in a context of its own, and the handler in a fresh ``contextvars.Context``."""

    def __init__(self, wrapped: "SyncHandler", *args: Any, **kwargs: Any) -> None:
        if isinstance(args[0], ServerProtocol):
            raise wrong_server("a plain function", "websockets.sync.server, or make it asynchronous")
        self.wrapped = wrapped
        self._context: UserExecutionContext | None = None
        self._variables = Context()
        self._meter = Meter(wrapped.limits, time.monotonic)
        self._child: UserExecutionContext | None = None
        self._after: LastEvent | None = None
        self._traced: Traced | None = None
        self._is_recorded = False
        self._sending = threading.RLock()  # an event must not come in the middle of a message in fragments
        super().__init__(*args, **kwargs)
        limit_size(self.protocol, wrapped.limits.max_size)

    # The handshake.

    def handshake(self, process_request: ProcessRequest | None = None, *args: Any, **kwargs: Any) -> None:
        try:
            super().handshake(partial(self._admit, process_request), *args, **kwargs)
        finally:
            if self.state is not OPEN and self._context is not None:
                self._end("disconnected", None)  # nobody will call the handler

    def _admit(
        self, process_request: ProcessRequest | None, connection: ServerConnection, request: Request
    ) -> Response | None:
        return self._variables.run(self._come_in, process_request, request)

    def _come_in(self, process_request: ProcessRequest | None, request: Request) -> Response | None:
        """Find out who this is. Returns how it is refused, or what ``process_request`` answers."""
        scope = scope_of(self, request)
        context = self.wrapped.admit(scope, self._variables)
        if isinstance(context, Response):
            return context
        self._context = context
        context._lifetime.run_in_current_thread()
        self._after = last_event(scope["query_string"])
        ambient.set(context)
        if (guard := self.wrapped.manager.egress) is not None:
            guard.exchange(context, scope)
        if (spans := self.wrapped.manager.telemetry.spans) is not None:
            spans.enter(context)
            self._traced = spans.connect(context)
        return None if process_request is None else self._asked(process_request, request)

    def _asked(self, process_request: ProcessRequest, request: Request) -> Response | None:
        try:
            response = process_request(self, request)
            if response is None or response.status_code == SWITCHING_PROTOCOLS:
                return response
            self._record(response.status_code)
        except Exception as error:
            refusal = self._end("failed", error)
            if refusal is None:
                raise
            return refusal_response(refusal)
        self._end("finished", None)
        return response

    # The handler.

    def run(self) -> None:
        """Let the handler run, in the connection's Context, and close its context."""
        self._variables.run(self._run)

    def _run(self) -> None:
        try:
            self._join()
            self.wrapped.handler(self)
            self._record(None)
        except BaseException as error:
            is_over = isinstance(error, ConnectionClosed) and self.state is not OPEN
            refusal = self._end("disconnected" if is_over else "failed", error)
            if refusal is None:
                raise
        else:
            refusal = self._end("finished", None)
        if refusal is not None:
            self._close(refusal.close_code, close_reason(refusal))

    def _join(self) -> None:
        context, manager = self._opened, self.wrapped.manager
        if self._traced is not None and manager.telemetry.spans is not None:
            manager.telemetry.spans.accept(self._traced)
        hub = manager._hub
        outbox = ThreadOutbox(self._send_event, self._over, hub.policy, hub.lock)
        hub.join(Connection(context, outbox, self._after))
        require_not_cut_off(context)

    @property
    def _opened(self) -> UserExecutionContext:
        assert self._context is not None  # the handshake is through, and nobody was refused
        return self._context

    def _end(self, reason: CloseReason, error: BaseException | None) -> Refusal | None:
        """Close the context. Returns what the client is to be told; None where an error is the handler's own."""
        context = self._opened
        lifetime = context._lifetime
        lifetime.task = None
        context.close(reason, error)
        refusal = refusal_for_reason(lifetime.reason)
        if refusal is None and error is not None:
            refusal = refusal_for(error)
            if refusal is None:
                return None
        elif error is not None and not isinstance(error, ConnectionClosed | ContextClosedError):
            logger.warning("a handler that was cut off (%s) ended in an error", lifetime.reason, exc_info=error)
        try:
            self.wrapped.manager._trail.settle()
        except LedgerUnavailableError as unrecorded:
            return refusal_for(unrecorded)
        return refusal

    def _record(self, status: int | None) -> None:
        """Strict mode: have the outcome on record before the client sees it. Raises LedgerUnavailableError."""
        manager = self.wrapped.manager
        if manager.audit == "strict" and not self._is_recorded:
            self._is_recorded = True
            manager._trail.answered(self._opened, status)
            manager._trail.settle()

    # Events.

    def _send_event(self, text: str) -> None:
        require_not_cut_off(self._opened)
        with self._sending:
            super().send(text)

    def _over(self) -> None:
        """No more events. Where that is because the context was closed under the handler, close the connection."""
        refusal = refusal_for_reason(self._opened._lifetime.reason)
        if refusal is None:
            return
        closing = threading.Thread(
            target=self._close,
            args=(refusal.close_code, close_reason(refusal)),
            name="ucm-middleware close",
            daemon=True,
        )
        try:
            closing.start()
        except RuntimeError:  # there can be no more threads
            self._abort()

    # What the handler calls.

    # It takes whatever one of the library's overloads takes.
    def recv(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, timeout: float | None = None, decode: bool | None = None
    ) -> Any:
        self._leave_message()
        data = super().recv(timeout, decode)
        self._enter_message(data)
        return data

    def recv_streaming(self, decode: bool | None = None) -> Iterator[Any]:
        self._leave_message()
        is_first = True
        for fragment in super().recv_streaming(decode):
            if is_first:
                self._enter_message(fragment)
                is_first = False
            yield fragment

    def _enter_message(self, data: str | bytes) -> None:
        context = self._opened
        spans = self.wrapped.manager.telemetry.spans
        if self._traced is not None and spans is not None:
            spans.begin_message(context, self._traced)
        self._meter.count(data)
        if self.wrapped.manager.egress is not None:
            context._exchange.came(data, context.user_id)
        if self.wrapped.context_per_message:
            self._child = child = context.create_child_context(OPERATION)
            ambient.set(child)

    def _leave_message(self) -> None:
        context = self._opened
        require_not_cut_off(context)
        child, self._child = self._child, None
        if child is not None:
            ambient.set(context)
            child.close("finished")
        spans = self.wrapped.manager.telemetry.spans
        if self._traced is not None and spans is not None:
            spans.end_message(self._traced)

    def send(self, message: Any, *, text: bool | None = None) -> None:
        require_not_cut_off(self._opened)
        guard = self.wrapped.manager.egress
        if guard is None:
            with self._sending:
                super().send(message, text=text)
            return
        outgoing = Outgoing(guard, self._opened, message)
        if not outgoing.must_stay():
            with self._sending:
                super().send(outgoing.message, text=text)
            outgoing.was_sent()

    def close(self, code: int = 1000, reason: str = "") -> None:
        context = self._context
        if context is not None and context.is_open:
            self.wrapped.manager._hub.leave(context)
            try:
                self._record(code)
            except LedgerUnavailableError as unrecorded:
                if (refusal := refusal_for(unrecorded)) is not None:
                    code, reason = refusal.close_code, close_reason(refusal)
        self._close(code, reason)

    def _close(self, code: int, reason: str) -> None:
        """The library's close, for which it waits at most ``close_timeout`` also where the client takes nothing: who
        sends holds the lock that it needs.
        """
        if self.close_timeout is None:
            super().close(code, reason)
            return
        overdue = threading.Timer(self.close_timeout, self._abort)
        overdue.daemon = True
        overdue.start()
        try:
            super().close(code, reason)
        finally:
            overdue.cancel()

    def _abort(self) -> None:
        """Have whatever blocks on the socket raise, in whichever thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
