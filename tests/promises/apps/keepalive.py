"""An app that says who the user is in the ways people do, and never takes it back.

`/as/<user>` sets a ContextVar, binds structlog's context, tells Sentry and fills `scope["state"]`; `/whoami`, and a
WebSocket on any path, answer as JSON what a later request gets to see of that.
"""

import json
from contextvars import ContextVar
from typing import Any, cast

import sentry_sdk
import structlog
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
from sentry_sdk.transport import Transport
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import merge_contextvars
from structlog.processors import JSONRenderer

from ucm_middleware import ContextFirewall, UserContextMiddleware


class Outbox(Transport):
    """Keeps what would go to Sentry."""

    def __init__(self) -> None:
        super().__init__()
        self.envelopes: list[Envelope] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.envelopes.append(envelope)


current_user: ContextVar[str | None] = ContextVar("current_user", default=None)
log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[merge_contextvars, JSONRenderer()])
outbox = Outbox()
# Without its default integrations nothing is patched: Sentry sees the app through its ASGI middleware alone.
sentry_sdk.init(transport=outbox, default_integrations=False, auto_enabling_integrations=False)


def become(user: str, scope: Scope) -> None:
    current_user.set(user)
    structlog.contextvars.bind_contextvars(user=user)
    sentry_sdk.set_user({"id": user})
    scope["state"]["user"] = user


def seen(scope: Scope) -> dict[str, Any]:
    sentry_sdk.capture_message("something happened")
    event = outbox.envelopes.pop().get_event()
    assert event is not None
    return {
        "contextvar": current_user.get(),
        "structlog": json.loads(log.info("something happened")).get("user"),
        "sentry": event.get("user", {}).get("id"),
        "state": scope["state"].get("user"),
        "pool": scope["state"].get("pool"),
    }


async def forgetful(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["pool"] = "made at startup"
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": json.dumps(seen(scope))})
        await send({"type": "websocket.close", "code": 1000})
    else:
        if scope["path"].startswith("/as/"):
            become(scope["path"].removeprefix("/as/"), scope)
        while (await receive()).get("more_body"):
            pass
        body = json.dumps(seen(scope)).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})


class OneStatePerConnection:
    """Plays a server that hands every request of a connection the same `scope["state"]`, as hypercorn once did."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._states: dict[tuple[str, int], dict[str, Any]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope["state"] = self._states.setdefault(scope["client"], scope["state"])
        await self.app(scope, receive, send)


class Bystander:
    """Stands outside of the app, as a server's own log does, and says in a header which user it saw there at first."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = current_user.get() or "nobody"

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-bystander-saw", user.encode())]
            await send(message)

        await self.app(scope, receive, told)


# It is an ASGI app, but gives itself its __call__ as it is made, which type checkers do not see.
bare = cast("ASGIApp", SentryAsgiMiddleware(forgetful))
observed = Bystander(bare)
sharing = OneStatePerConnection(bare)
firewalled = Bystander(OneStatePerConnection(ContextFirewall(bare)))
managed = Bystander(OneStatePerConnection(UserContextMiddleware(bare)))
