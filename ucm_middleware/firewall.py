"""ContextFirewall: each request in a fresh contextvars.Context, so that nothing an earlier one set can be seen."""

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import Context, ContextVar, copy_context
from types import CoroutineType, coroutine
from typing import Any, Final, TypeVar, cast

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.types import AnyASGIApp, ASGIApp, Message, Receive, Scope, Send

_T = TypeVar("_T")
_UNSET: Final = object()
_DONE: Final = object()

BOUNDARY: Final = "ucm_middleware.boundary"
"""The scope key under which the firewall leaves the Boundary of the request."""


class ContextFirewall:
    """Runs the app for each HTTP request and WebSocket connection in a fresh ``contextvars.Context``.

    Servers run the requests of one connection one after another, and some of them in the Context that the last request
    left behind. Put this outermost. ``UserContextMiddleware`` is its own firewall where none is outside of it. What an
    outer middleware sets for the request, such as a tracing span, is let through when its ContextVar is named in
    ``keep``. Name only variables that the outer middleware sets in every request: of another one, an earlier request's
    value may be what is let through. For such, put a ``ContextFirewall`` outermost, around the outer middleware too.

    ``scope["state"]`` is copied for each request for the same reason.

    Raises ConfigurationError for what is no list of ContextVars.
    """

    def __init__(self, app: AnyASGIApp, *, keep: Sequence[ContextVar[Any]] = ()) -> None:
        self.app: ASGIApp = app
        self.keep = checked_keep(keep)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or (BOUNDARY in scope and is_enclosed(scope)):
            await self.app(scope, receive, send)
            return
        boundary = Boundary()
        try:
            rest = boundary.start(self.app, scope, receive, send, self.keep)
            if rest is not None:
                await rest
        finally:
            boundary.context = boundary.outside = None


def checked_keep(keep: Any) -> tuple[ContextVar[Any], ...]:
    """The variables to let through. Raises ConfigurationError for what is no list of ContextVars."""
    variables: tuple[Any, ...] | None = tuple(keep) if hasattr(keep, "__iter__") else None
    if variables is None or not all(isinstance(variable, ContextVar) for variable in variables):
        raise ConfigurationError(f"keep must be a list of ContextVars, not {keep!r}; give keep=[variable]")
    return variables


def is_enclosed(scope: Scope) -> bool:
    """Whether the firewall whose boundary is in the scope is still outside. If not, the scope is used again."""
    boundary: Boundary = scope[BOUNDARY]
    return boundary.context is not None


class Boundary:
    """The Context a request runs in, and what is outside of it, where messages are stepped there.

    Whoever makes it empties it in the end, since what runs in a Context may refer to its scope, and so may a server's
    ``send``. Filled in by ``start``: a constructor would cost each request twice as much.
    """

    __slots__ = ("context", "outside")

    context: Context | None
    outside: "Outside | None"

    def start(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, keep: tuple[ContextVar[Any], ...]
    ) -> Awaitable[None] | None:
        """Run the app in a fresh Context, in the task that calls this: no task more, and cancelled as ever. Returns
        what is left to await, None when the app had nothing to wait for.

        The scope stays the same object, since outer middlewares read from it what the router wrote, such as the route;
        but its state is from now on shared with no other request.

        The server's ``receive`` and ``send`` are stepped outside again: a server may start the next request of the
        connection from within them, and it, its log and the middlewares around us would then inherit this Context. A
        WebSocket is the last exchange of its connection, other than over HTTP/2: there it is done for the sake of what
        is set outside, and messages cost nothing where nothing is.
        """
        if "state" in scope:
            scope["state"] = scope["state"].copy()
        scope[BOUNDARY] = self
        self.context = context = Context()
        run = context.run
        for variable in keep:
            if (value := variable.get(_UNSET)) is not _UNSET:
                run(variable.set, value)
        # A copy, since a Context cannot be entered twice, and the one we are in is entered.
        around = copy_context()
        if scope["type"] == "http" or len(around) or scope.get("http_version", "1.1") != "1.1":
            self.outside = outside = Outside()
            outside.run = around.run
            outside.receive_there = receive
            outside.send_there = send
            outside.last_sent = None
            receive, send = outside.receive, outside.send
        else:
            self.outside = None
        running = run(app, scope, receive, send)
        if type(running) is not CoroutineType:
            return _step(run, running)
        steps = running.__await__()  # pyright: ignore[reportUnknownVariableType]
        waiting = run(next, steps, _DONE)  # pyright: ignore[reportUnknownArgumentType]
        return None if waiting is _DONE else _go_on(run, steps, waiting)


class Outside:
    """The server's ``receive`` and ``send``, each step of them in the Context that ``run`` belongs to.

    ``last_sent`` is the type of the message that was sent last, from the call on: an app may make a task of a message,
    which begins later. For its sake both answer with coroutines, as servers do.
    """

    __slots__ = ("last_sent", "receive_there", "run", "send_there")

    run: Callable[..., Any]
    receive_there: Receive
    send_there: Send
    last_sent: str | None

    async def receive(self) -> Message:
        run = self.run
        return await _step(run, run(self.receive_there))

    def send(self, message: Message) -> Awaitable[None]:
        self.last_sent = message["type"]
        return self._send(message)

    async def _send(self, message: Message) -> None:
        run = self.run
        sending = run(self.send_there, message)
        if type(sending) is CoroutineType:
            steps = sending.__await__()  # pyright: ignore[reportUnknownVariableType]
            waiting = run(next, steps, _DONE)
            if waiting is not _DONE:
                await _go_on(run, steps, waiting)
        else:
            await _step(run, sending)


@coroutine
def _step(run: Callable[..., Any], work: Awaitable[_T]) -> Generator[Any, Any, _T]:
    """Await ``work``, each of its steps in the Context that ``run`` belongs to."""
    steps: Any = work if hasattr(work, "send") else run(work.__await__)
    if not hasattr(steps, "send"):
        return cast("_T", (yield from steps))  # a bare iterator, of some C type: it has no steps to put anywhere
    try:
        waiting = run(steps.send, None)
    except StopIteration as stop:
        return cast("_T", stop.value)
    rest: Any = _go_on(run, steps, waiting)
    return cast("_T", (yield from rest))


@coroutine
def _go_on(run: Callable[..., Any], steps: Any, waiting: object) -> Generator[Any, Any, Any]:
    """The rest of something that has been begun, and waits."""
    send, throw = steps.send, steps.throw
    try:
        while True:
            try:
                value = yield waiting
            except GeneratorExit:
                run(steps.close)
                raise
            except BaseException as error:  # noqa: BLE001 - passed on to the app, as any await would
                waiting = run(throw, error)
            else:
                waiting = run(send, value)
    except StopIteration as stop:
        return stop.value
