"""An app whose workers share their users. Its handlers tell when they had a context to use, and under which lease.

CLUSTER in the environment has the fields of its policy as JSON. The door, outside of the middleware, tells a test the
state of the worker, and has it do what an application does.
"""

import asyncio
import json
import os
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from ucm_middleware import (
    EVERYONE,
    ClusterPolicy,
    ClusterUnavailableError,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
)
from ucm_middleware.websocket.starlette import messages

STEP = 0.005
"""Seconds between two uses of a context."""

manager = UserContextManager(
    cluster=ClusterPolicy(**json.loads(os.environ["CLUSTER"])), max_contexts=10_000, max_anonymous_contexts=10
)
let_go = asyncio.Event()


def lease_of(context: Any) -> str:
    """`tenancy.number`; "" for one that a worker on its own gave."""
    lease = context._lifetime.lease
    return f"{lease.tenancy.id}.{lease.number}" if lease.tenancy.id else ""


used: dict[str, float] = {}
"""When each lease's context was used last, as far as it let itself be."""


class Uses:
    """When a handler had its context to use: by the machine's monotonic clock, which all processes share."""

    def __init__(self) -> None:
        self.context = current_context()
        self.begin = time.monotonic()
        self.last = self.begin

    def use(self) -> None:
        """Raises ContextClosedError once it is gone."""
        before = time.monotonic()
        self.context.agent_context["used"] = before
        self.last = used[lease_of(self.context)] = before

    def told(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "lease": lease_of(self.context), "begin": self.begin, "last": self.last}


async def work(request: Request) -> JSONResponse:
    """Use the context for so many seconds."""
    uses = Uses()
    until = uses.begin + float(request.query_params["seconds"])
    while True:
        uses.use()
        if time.monotonic() >= until:
            return JSONResponse(uses.told())
        await asyncio.sleep(STEP)


async def hold(request: Request) -> JSONResponse:
    """Use it until the test says so."""
    uses = Uses()
    while not let_go.is_set():
        uses.use()
        await asyncio.sleep(STEP)
    return JSONResponse(uses.told())


async def talk(websocket: WebSocket) -> None:
    """Answer each message with the use that was made for it."""
    uses = Uses()
    async for _ in messages(websocket):
        uses.use()
        await websocket.send_json({"type": "told", **uses.told()})


def health() -> dict[str, Any]:
    member = manager.cluster
    with manager.privileged(reason="the test counts", users=EVERYONE):
        live = len(manager.get_active_contexts())
    return {
        "pid": os.getpid(),
        "is_healthy": manager.is_healthy(),
        "state": None if member is None else str(member.state),
        "live": live,
        "renewals": 0 if member is None else member.figures().renewals,
    }


async def uses_so_far(request: Request) -> JSONResponse:
    return JSONResponse(used)


async def state(request: Request) -> JSONResponse:
    return JSONResponse(health())


async def open_gate(request: Request) -> JSONResponse:
    let_go.set()
    return JSONResponse(None)


async def revoke(request: Request) -> JSONResponse:
    user = request.query_params["user"]
    with manager.privileged(reason="the test revokes", users=[user]):
        try:
            return JSONResponse(await asyncio.to_thread(manager.revoke, user, "the test"))
        except ClusterUnavailableError:
            return JSONResponse("unavailable")


async def send(request: Request) -> JSONResponse:
    """Send events, one after another; the sequences that they got."""
    user, by, count = (request.query_params[name] for name in ("user", "by", "count"))
    sequences: list[int] = []
    with manager.privileged(reason="the test sends", users=[user]):
        for number in range(int(count)):
            delivery = await manager.send_event(user, "message", {"by": by, "n": number})
            sequences.append(delivery.sequence)
    return JSONResponse(sequences)


async def trail(request: Request) -> JSONResponse:
    user = request.path_params["user"]
    with manager.privileged(reason="the test reads", users=EVERYONE):
        return JSONResponse(manager.get_audit_trail(user))


async def cluster_view(request: Request) -> JSONResponse:
    with manager.privileged(reason="the test reads", users=EVERYONE):
        shown = await asyncio.to_thread(manager.get_active_contexts, cluster=True)
    return JSONResponse({"/".join(map(str, key)): told for key, told in shown.items()})


door = Router(
    [
        Route("/door/state", state),
        Route("/door/uses", uses_so_far),
        Route("/door/open", open_gate, methods=["POST"]),
        Route("/door/revoke", revoke, methods=["POST"]),
        Route("/door/send", send, methods=["POST"]),
        Route("/door/trail/{user}", trail),
        Route("/door/cluster", cluster_view),
    ]
)
inner = Starlette(routes=[Route("/work", work), Route("/hold", hold), WebSocketRoute("/talk", talk)])
guarded = UserContextMiddleware(
    inner, manager=manager, identify=bearer_token(lambda token: token.removeprefix("token-of-"))
)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    through_the_door = scope["type"] == "http" and scope["path"].startswith("/door/")
    await (door if through_the_door else guarded)(scope, receive, send)
