"""Several apps in one process, each in a hall of its own with a manager of its own, which differ in what is bounded.

`/main/events` is the WebSocket of the `main` hall. What the test does as trusted code goes through the door.
"""

import threading
from asyncio import CancelledError
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, WebSocket
from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from ucm_middleware import (
    Delivery,
    EventPolicy,
    Principal,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import CurrentContext
from ucm_middleware.websocket.starlette import messages

journal = Journal()

SMALL: dict[str, Any] = {"queue_events": 20, "queue_bytes": 512 * 1024}


@dataclass
class Hall:
    events: EventPolicy = field(default_factory=EventPolicy)
    options: dict[str, Any] = field(default_factory=dict)
    manager: UserContextManager = field(init=False)

    def __post_init__(self) -> None:
        self.manager = UserContextManager(events=self.events)


halls = {
    "main": Hall(options={"allowed_origins": ["https://app.example.com"]}),
    "close": Hall(EventPolicy(**SMALL)),
    "drop": Hall(EventPolicy(**SMALL, when_full="drop_oldest")),
    "wait": Hall(EventPolicy(**SMALL, when_full="wait", wait_seconds=60)),
    "briefly": Hall(EventPolicy(**SMALL, when_full="wait", wait_seconds=0.01)),
    "bounded": Hall(options={"max_message_size": 1000, "message_rate": 4.0, "context_per_message": True}),
}


def verify(token: str) -> Principal | None:
    """`token-of-alice`, or `token-of-alice-for-5`: the credentials hold for so many seconds."""
    scheme, _, user = token.partition("-of-")
    user, _, seconds = user.partition("-for-")
    expires_at = datetime.now(UTC) + timedelta(seconds=float(seconds)) if seconds else None
    return Principal(user, expires_at) if scheme == "token" else None


by_token = bearer_token(verify)


def identify(connection: HTTPConnection) -> Any:
    return connection.cookies.get("session") or by_token(connection)


def shown(delivery: Delivery) -> dict[str, Any]:
    return {
        "epoch": delivery.epoch,
        "sequence": delivery.sequence,
        "reached": delivery.delivered + delivery.queued,
        "dropped": [lost.why for lost in delivery.dropped],
    }


def app_of(name: str, manager: UserContextManager) -> FastAPI:
    app = FastAPI()

    @app.websocket("/events")
    async def events(websocket: WebSocket, context: CurrentContext) -> None:
        """Says what it hears. Events come by themselves."""
        async for message in messages(websocket):
            await websocket.send_text(f"echo {message}")
        journal.note("gone", user=context.user_id)

    @app.websocket("/elsewhere")
    async def elsewhere(websocket: WebSocket, context: CurrentContext) -> None:
        """Waits for something that is no message."""
        await websocket.accept()
        await stay("elsewhere", context.user_id)

    @app.websocket("/log-in")
    async def log_in(websocket: WebSocket, context: CurrentContext) -> None:
        async for message in messages(websocket):
            context.bind(message)
            await websocket.send_text(f"welcome {message}")

    @app.websocket("/sign-out")
    async def sign_out(websocket: WebSocket, context: CurrentContext) -> None:
        async for _ in messages(websocket):
            manager.revoke(context.user_id, "signed out by herself")
            journal.note("signed out")

    @app.websocket("/notes")
    async def notes(websocket: WebSocket, context: CurrentContext) -> None:
        """Each message is put beside what is there already, in the context of the message."""
        async for message in messages(websocket):
            mine = current_context()
            mine.agent_context.setdefault("notes", []).append(message)
            await websocket.send_json(
                {
                    "notes": mine.agent_context["notes"],
                    "request_id": mine.request_id,
                    "parent": mine.parent_request_id,
                    "connection": context.request_id,
                    "user": mine.user_id,
                }
            )
            await manager.send_event(mine.user_id, "message", message)

    @app.get("/send")
    async def send(context: CurrentContext, count: int, size: int = 0, by: str = "task") -> list[dict[str, Any]]:
        return [
            shown(await manager.send_event(context.user_id, "message", {"by": by, "n": n, "pad": "x" * size}))
            for n in range(count)
        ]

    @app.get("/post")
    def post(context: CurrentContext, count: int) -> list[dict[str, Any]]:
        return [shown(manager.post_event(context.user_id, "message", {"by": "post", "n": n})) for n in range(count)]

    @app.get("/thread")
    async def thread(context: CurrentContext, count: int) -> None:
        """A thread that belongs to no request, and says for whom it works."""

        def work(user: str) -> None:
            with manager.privileged(reason="a job in the background", users=[user]):
                for n in range(count):
                    manager.post_event(user, "message", {"by": "thread", "n": n})
            journal.note("thread ended", user=user)

        threading.Thread(target=work, args=(context.user_id,)).start()

    @app.get("/hold")
    async def hold(context: CurrentContext) -> str:
        journal.note("held", user=context.user_id)
        await stay("hold", context.user_id)
        return "done"

    @app.get("/quick")
    async def quick() -> str:
        return "done"

    return app


async def stay(name: str, user: str) -> None:
    try:
        await journal.gate("let go").passed()
    except CancelledError:
        journal.note("interrupted", name=name, user=user)
        raise


def hall_of(request: Request) -> tuple[UserContextManager, str]:
    return halls[request.path_params["hall"]].manager, request.path_params["user"]


async def send_as_trusted(request: Request) -> JSONResponse:
    """With `thread_id`, `run_id` and `connection_id` in the query, narrowed to that."""
    manager, user = hall_of(request)
    narrowed = dict(request.query_params)
    with manager.privileged(reason="the test sends", users=[user]):
        return JSONResponse(shown(await manager.send_event(user, "message", None, **narrowed)))


async def revoke(request: Request) -> JSONResponse:
    manager, user = hall_of(request)
    with manager.privileged(reason="the test signs her out", users=[user]):
        return JSONResponse(manager.revoke(user, "the test says so"))


async def trail(request: Request) -> JSONResponse:
    manager, user = hall_of(request)
    with manager.privileged(reason="the test reads", users=[user]):
        return JSONResponse(manager.get_audit_trail(user))


async def waiting(request: Request) -> JSONResponse:
    """How many events, and bytes, wait for the slowest of a user's connections, and how many connections there are."""
    manager, user = hall_of(request)
    channel = manager._hub._channels.get(user)
    outboxes = [] if channel is None else [each.outbox for each in channel.connections.values()]
    events = max((len(outbox) for outbox in outboxes), default=0)
    size = max((outbox._size for outbox in outboxes), default=0)
    return JSONResponse({"events": events, "bytes": size, "connections": len(outboxes)})


def hall_app(name: str, hall: Hall) -> UserContextMiddleware:
    inner = app_of(name, hall.manager)
    return UserContextMiddleware(inner, manager=hall.manager, identify=identify, **hall.options)


app = Starlette(routes=[Mount(f"/{name}", app=hall_app(name, hall)) for name, hall in halls.items()])
door = [
    Route("/door/in/{hall}/send/{user}", send_as_trusted, methods=["POST"]),
    Route("/door/in/{hall}/revoke/{user}", revoke, methods=["POST"]),
    Route("/door/in/{hall}/trail/{user}", trail),
    Route("/door/in/{hall}/waiting/{user}", waiting),
]
app.add_middleware(Door, manager=halls["main"].manager, journal=journal, routes=door)
