"""An app in which users ask for what is theirs and for what is not, by key, by pair, by reference and by name.

Nothing here catches what the product raises: how a denial looks to the one who asked is the product's own doing.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from promise_journal import Door, Journal
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import (
    EVERYONE,
    CrossUserAccessError,
    UserContextError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
)
from ucm_middleware.audit import denials
from ucm_middleware.fastapi import CurrentContext

patch.object(
    denials, "EACH", 10_000
).start()  # the tests share one server, and each looks at the records of its own denials

journal = Journal()
manager = UserContextManager()
app = FastAPI()
handles: dict[str, UserExecutionContext] = {}


def enter(context: UserExecutionContext) -> str:
    with managed_user_context(context):
        return current_context().user_id


Action = Callable[[str, str], Any]

ACTIONS: dict[str, Action] = {
    "get": lambda user, request_id: manager.get_context(user).user_id,
    "get-pair": lambda user, request_id: manager.get_context((user, request_id)).user_id,
    "clear": lambda user, request_id: manager.clear_context(user),
    "clear-pair": lambda user, request_id: manager.clear_context((user, request_id)),
    "cleanup": lambda user, request_id: manager.cleanup_context(user),
    "cleanup-pair": lambda user, request_id: manager.cleanup_context((user, request_id)),
    "set-pair": lambda user, request_id: manager.set_context((user, request_id), current_context()),
    "create": lambda user, request_id: manager.create_isolated_context(user).user_id,
    "create-pair": lambda user, request_id: manager.create_isolated_context(user, "a-new-one").user_id,
    "create-managed": lambda user, request_id: manager.create_managed_context(user).user_id,
    "create-unified": lambda user, request_id: manager.create_context_with_unified_ids(user).user_id,
    "trail": lambda user, request_id: (manager.get_audit_trail(user) or {})["user_id"],
    "impersonate": lambda user, request_id: enter(create_isolated_execution_context(user)),
}
"""What may be asked of the manager for a user; each takes a user's id and the request id of a context of theirs."""

FOR_ALL: dict[str, Action] = {
    "report": lambda user, request_id: manager.validate_isolation(),
    "cleanup-all": lambda user, request_id: manager.cleanup_all_contexts(),
}

BY_REFERENCE: dict[str, Action] = {
    "enter": lambda user, request_id: enter(handles[user]),
    "set": lambda user, request_id: manager.set_context("mine", handles[user]),
}


async def act(action: str, user: str, request_id: str) -> Any:
    outcome = (ACTIONS | FOR_ALL | BY_REFERENCE)[action](user, request_id)
    return await outcome if inspect.isawaitable(outcome) else outcome


def publish(context: UserExecutionContext) -> None:
    """Put a context under its owner's id, and into the hands of everybody."""
    manager.set_context(context.user_id, context)
    handles[context.user_id] = context


@app.get("/hold")
async def hold(context: CurrentContext) -> str:
    publish(context)
    context.agent_context["secret"] = f"{context.user_id}'s"
    journal.note("held", user=context.user_id, request_id=context.request_id)
    await journal.gate("let go").passed()
    return str(context.agent_context["secret"])


@app.get("/act/{action}")
async def act_here(action: str, user: str, request_id: str) -> Any:
    return await act(action, user, request_id)


@app.get("/own/{action}")
async def act_on_own(action: str, context: CurrentContext) -> Any:
    own = manager.create_isolated_context(context.user_id, "own-1")
    publish(own)
    outcome = await act(action, own.user_id, own.request_id)
    for user, request_id in [(live["user_id"], live["request_id"]) for live in manager.get_active_contexts().values()]:
        if request_id != context.request_id:
            await manager.cleanup_context((user, request_id))
    return outcome


@app.get("/in-thread/{action}")
def act_in_thread(action: str, user: str, request_id: str) -> Any:
    return ACTIONS[action](user, request_id)


async def depend(action: str, user: str, request_id: str) -> Any:
    return await act(action, user, request_id)


@app.get("/in-dependency/{action}", dependencies=[Depends(depend)])
async def act_in_dependency() -> str:
    return "not reached"


@app.get("/in-task/{action}")
async def act_in_task(action: str, user: str, request_id: str) -> Any:
    return await asyncio.create_task(act(action, user, request_id))


async def act_in_group(action: str, user: str, request_id: str) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(act(action, user, request_id))
        group.create_task(asyncio.Event().wait())


@app.get("/in-group/{action}")
async def act_in_group_here(action: str, user: str, request_id: str) -> None:
    await act_in_group(action, user, request_id)


@app.get("/in-child/{action}")
async def act_in_child(action: str, user: str, request_id: str, context: CurrentContext) -> Any:
    async with managed_user_context(context.create_child_context("part of the work")):
        return await act(action, user, request_id)


@app.get("/in-background/{action}")
async def act_in_background(action: str, user: str, request_id: str, background: BackgroundTasks) -> str:
    async def later() -> None:
        try:
            await act(action, user, request_id)
        except UserContextError as error:
            journal.note("refused", kind=type(error).__name__)

    background.add_task(later)
    return "later"


@app.get("/in-executor/{action}")
async def act_in_executor(action: str, user: str, request_id: str) -> Any:
    """`run_in_executor` drops the context: this is code of no user."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, ACTIONS[action], user, request_id)


@app.websocket("/ws/{when}/{action}")
async def act_on_websocket(websocket: WebSocket, when: str, action: str, user: str, request_id: str) -> None:
    if when == "before":
        await act(action, user, request_id)
    await websocket.accept()
    if when == "after":
        await act(action, user, request_id)
    if when == "in-group":
        await act_in_group(action, user, request_id)
    await websocket.send_text("done")


@app.get("/list")
async def list_active() -> list[str]:
    return [live["user_id"] for live in manager.get_active_contexts().values()]


@app.get("/supervise")
async def supervise(user: str, named: str, request_id: str) -> dict[str, Any]:
    """Cross over to a user on purpose; then try again when the permission has ended, also from a task that had it."""

    def look() -> str:
        try:
            return str(manager.get_context((user, request_id)).agent_context["secret"])
        except CrossUserAccessError:
            return "denied"

    async def look_later() -> str:
        await journal.gate("the block has ended").passed()
        return look()

    outcomes: dict[str, Any] = {"before": look()}
    with manager.privileged(reason="ticket 4711", users=EVERYONE if named == "everyone" else [named]):
        trail = manager.get_audit_trail(named) or {"events": []}
        outcomes["recorded"] = [event["event"] for event in trail["events"]]
        outcomes["within"] = look()
        outcomes["listed"] = sorted(live["user_id"] for live in manager.get_active_contexts().values())
        inheriting = asyncio.create_task(look_later())
    journal.gate("the block has ended").open()
    outcomes["after"] = look()
    outcomes["inherited"] = await inheriting
    return outcomes


@app.get("/keep")
async def keep(request_id: str, text: str, context: CurrentContext) -> dict[str, Any]:
    """Keep something under keys of one's own, and see what is there once everybody has."""
    made = manager.create_isolated_context(context.user_id, request_id, agent_context={"of": context.user_id})
    manager.set_context(text, made)
    journal.note("kept", user=context.user_id)
    await journal.gate("read back").passed()
    by_pair, by_text = manager.get_context((context.user_id, request_id)), manager.get_context(text)
    answer = {
        "same": by_pair is made and by_text is made,
        "of": made.agent_context["of"],
        "mine": sorted(live["request_id"] for live in manager.get_active_contexts().values()),
    }
    manager.clear_context(text)
    return answer


@app.get("/replace")
async def replace(context: CurrentContext) -> list[bool]:
    """Put two contexts under one key of one's own, one after the other."""
    first = manager.create_isolated_context(context.user_id, "first")
    second = manager.create_isolated_context(context.user_id, "second")
    manager.set_context("draft", first)
    manager.set_context("draft", second)
    seen = [first.is_open, second.is_open, manager.get_context("draft") is second]
    manager.clear_context("draft")
    return seen


@app.get("/occupy")
async def occupy(user: str, context: CurrentContext) -> bool:
    """Put one's own context under the id of another user."""
    manager.set_context(user, context)
    journal.note("occupied")
    await journal.gate("let go").passed()
    return manager.get_context(user) is context


@app.get("/arrive")
async def arrive(user: str, context: CurrentContext) -> list[str]:
    """What a user finds under their own id when they come, and when they have taken it."""
    context.bind(user)
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(manager.get_context(user).user_id)
        except UserContextError as error:
            outcomes.append(type(error).__name__)
        manager.set_context(user, context)
    return outcomes


async def squat(request: Request) -> JSONResponse:
    """Trusted code gives a user's id as a key to somebody else, before that user comes."""
    with manager.privileged(reason="a mistake", users=EVERYONE):
        squatter = manager.create_isolated_context("mallory")
        manager.set_context(request.query_params["user"], squatter)
    return JSONResponse(squatter.request_id)


async def settle(request: Request) -> JSONResponse:
    """Trusted code gives the user their own id as a key."""
    user = request.query_params["user"]
    with manager.privileged(reason="setting it right", users=EVERYONE):
        manager.set_context(user, create_isolated_execution_context(user))
        owner = manager.get_context(user).user_id
        manager.clear_context(user)
    return JSONResponse(owner)


async def evict(request: Request) -> JSONResponse:
    """Trusted code ends the squatter's context. Says whether it was live."""
    with manager.privileged(reason="the test is over", users=EVERYONE):
        return JSONResponse(await manager.cleanup_context(("mallory", request.query_params["request_id"])))


async def unprivileged(request: Request) -> JSONResponse:
    """What code of no user gets that does not say what it is for."""
    user, request_id = request.query_params["user"], request.query_params["request_id"]
    outcomes = {}
    actions = ACTIONS | FOR_ALL | {"list": lambda user, request_id: manager.get_active_contexts()}
    if user in handles:
        actions |= BY_REFERENCE
    # These need a context to act on, or are about one that no manager knows.
    for action in actions.keys() - {"set-pair", "impersonate"}:
        try:
            outcome = actions[action](user, request_id)
            await outcome if inspect.isawaitable(outcome) else outcome
            outcomes[action] = "done"
        except UserContextError as error:
            outcomes[action] = type(error).__name__
    return JSONResponse(outcomes)


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return unquote(user) if scheme == "token" else None


app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify))
door = [
    Route("/door/unprivileged", unprivileged),
    Route("/door/squat", squat, methods=["POST"]),
    Route("/door/settle", settle, methods=["POST"]),
    Route("/door/evict", evict, methods=["POST"]),
]
app.add_middleware(Door, manager=manager, journal=journal, routes=door)
