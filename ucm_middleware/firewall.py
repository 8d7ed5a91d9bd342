"""ContextFirewall: each request in a fresh contextvars.Context, so that nothing an earlier one set can be seen."""

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import Context, ContextVar, copy_context
from types import coroutine
from typing import Any, Final, TypeVar, cast

from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

_T = TypeVar("_T")
_UNSET: Final = object()

BOUNDARY: Final = "ucm_middleware.boundary"
"""The scope key under which the firewall leaves the Boundary of the request."""


class Boundary:
    """The Context a request runs in. Emptied when it ends, since what runs in a Context may refer to its scope."""

    __slots__ = ("context",)

    def __init__(self) -> None:
        self.context: Context | None = Context()


class ContextFirewall:
    """Runs the app for each HTTP request and WebSocket connection in a fresh ``contextvars.Context``.

    Servers run the requests of one connection one after another, and some of them in the Context that the last request
    left behind. Put this outermost. ``UserContextMiddleware`` is its own firewall where none is outside of it. What an
    outer middleware sets for the request, such as a tracing span, is let through when its ContextVar is named in
    ``keep``.

    ``scope["state"]`` is copied for each request for the same reason.
    """

    def __init__(self, app: ASGIApp, *, keep: Sequence[ContextVar[Any]] = ()) -> None:
        self.app = app
        self.keep = tuple(keep)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or is_enclosed(scope):
            await self.app(scope, receive, send)
        else:
            await run_enclosed(self.app, scope, receive, send, self.keep)


def is_enclosed(scope: Scope) -> bool:
    """Whether a firewall is outside already. A boundary that has ended does not count: the scope was used again."""
    boundary = scope.get(BOUNDARY)
    return boundary is not None and boundary.context is not None


async def run_enclosed(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, keep: tuple[ContextVar[Any], ...]
) -> None:
    """Run the app in a fresh Context, with a state that it shares with no other request.

    The scope stays the same object: outer middlewares read from it what the router wrote, such as the route.
    """
    scope[BOUNDARY] = boundary = Boundary()
    state = scope.get("state")
    if isinstance(state, dict):
        scope["state"] = dict(cast("dict[str, Any]", state))
    try:
        await _run_within(boundary, app, scope, receive, send, keep)
    finally:
        boundary.context = None


async def _run_within(
    boundary: Boundary, app: ASGIApp, scope: Scope, receive: Receive, send: Send, keep: tuple[ContextVar[Any], ...]
) -> None:
    """Step the app in the boundary's Context, in the task that awaits this: no task more, and cancelled as ever.

    The server's ``receive`` and ``send`` are stepped outside again: a server may start the next request of the
    connection from within them, and it, its log and the middlewares around us would then inherit the boundary's
    Context.
    """
    context = boundary.context
    assert context is not None
    for variable in keep:
        if (value := variable.get(_UNSET)) is not _UNSET:
            context.run(variable.set, value)
    # A copy, since a Context cannot be entered twice, and the one we are in is entered.
    outside = copy_context().run

    def receive_outside() -> Awaitable[Message]:
        return _step(outside, outside(receive))

    def send_outside(message: Message) -> Awaitable[None]:
        return _step(outside, outside(send, message))

    run = context.run
    await _step(run, run(app, scope, receive_outside, send_outside))


@coroutine
def _step(run: Callable[..., Any], work: Awaitable[_T]) -> Generator[Any, Any, _T]:
    """Await ``work``, each of its steps in the Context that ``run`` belongs to."""
    steps: Any = work if hasattr(work, "send") else run(work.__await__)
    if not hasattr(steps, "send"):
        return cast("_T", (yield from steps))  # a bare iterator, of some C type: it has no steps to put anywhere
    step, throw = steps.send, steps.throw
    try:
        waiting = run(step, None)
        while True:
            try:
                value = yield waiting
            except GeneratorExit:
                run(steps.close)
                raise
            except BaseException as error:  # noqa: BLE001 - passed on to the app, as any await would
                waiting = run(throw, error)
            else:
                waiting = run(step, value)
    except StopIteration as stop:
        return cast("_T", stop.value)
