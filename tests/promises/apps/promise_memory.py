"""An app that gives users data from one place, and one that makes them share things behind the product's back."""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from promise_journal import Door, Journal
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import (
    EVERYONE,
    InvalidContextError,
    Shared,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    create_isolated_execution_context,
)
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
manager = UserContextManager()
app = FastAPI()

DEFAULTS: dict[str, Any] = {"theme": "light", "recent": [], "panels": {"left": {"open": True}}, "seen": {"nobody"}}


class Session:
    """Stands for a database session."""

    def __init__(self) -> None:
        self.rows: list[str] = []


class Board:
    """Something of the app's own that holds a list."""

    def __init__(self) -> None:
        self.notes: list[str] = ["welcome"]


BOARD = Board()
NOTICE = ("welcome", 1, frozenset({"all"}))
SESSION = Session()


def kept_by(context: UserExecutionContext) -> UserExecutionContext:
    manager.set_context("kept", context)
    return context


def ids(context: UserExecutionContext) -> dict[str, Any]:
    return {"user_id": context.user_id, "thread_id": context.thread_id, "run_id": context.run_id}


WAYS_IN: dict[str, Callable[[Request, UserExecutionContext], UserExecutionContext]] = {
    "create": lambda request, context: manager.create_isolated_context(context.user_id, agent_context=DEFAULTS),
    "create-managed": lambda request, context: manager.create_managed_context(context.user_id, agent_context=DEFAULTS),
    "set": lambda request, context: kept_by(create_isolated_execution_context(context.user_id, agent_context=DEFAULTS)),
    "from-request": lambda request, context: kept_by(
        UserExecutionContext.from_request(**ids(context), agent_context=DEFAULTS)
    ),
    "from-connection": lambda request, context: kept_by(
        UserExecutionContext.from_connection(request, user_id=context.user_id, agent_context=DEFAULTS)
    ),
    "child": lambda request, context: context.create_child_context("part of the work", agent_context=DEFAULTS),
}


def shown(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of the data, as JSON has it."""
    copied: dict[str, Any] = json.loads(json.dumps({**data, "seen": sorted(data["seen"])}))
    return copied


@app.get("/defaults/{way}")
async def defaults(way: str, request: Request, context: CurrentContext) -> dict[str, Any]:
    """Give a context the defaults of everybody, and change all that is in them."""
    made = WAYS_IN[way](request, context)
    data = made.agent_context
    before = shown(data)
    user = context.user_id
    data["theme"] = user
    data["recent"].append(user)
    data["panels"]["left"]["open"] = user
    data["seen"].add(user)
    journal.note("changed", user=user)
    await journal.gate("all have changed theirs").passed()
    after = shown(data)
    await made.aclose()
    return {"before": before, "after": after}


@app.get("/inherit")
async def inherit(context: CurrentContext) -> dict[str, Any]:
    """Let a child change what it has from its parent."""
    context.agent_context["work"] = {"notes": ["parent's"]}
    child = context.create_child_context("part of the work")
    child.agent_context["work"]["notes"].append("child's")
    child.environment.set("MODE", "child's")
    return {
        "parent": context.agent_context["work"]["notes"],
        "child": child.agent_context["work"]["notes"],
        "mode": context.environment.get("MODE"),
    }


def closure_over(thing: list[str]) -> Callable[[], list[str]]:
    return lambda: thing


def share(context: UserExecutionContext, way: str) -> None:
    data = context.agent_context
    match way:
        case "item":
            data["notes"] = BOARD.notes
        case "nested":
            data["work"] = [{"of today": (1, BOARD.notes)}]
        case "object":
            data["board"] = BOARD
        case "method":
            data["post"] = BOARD.notes.append
        case "closure":
            data["read"] = closure_over(BOARD.notes)
        case "metadata":
            context.audit_metadata["notes"] = BOARD.notes
        case "attribute":
            name = "board"
            setattr(context, name, BOARD.notes)
        case "child":
            context.create_child_context("part of the work").agent_context["notes"] = BOARD.notes
        case "session":
            manager.create_isolated_context(context.user_id, "with-session", db_session=SESSION)
        case "marked":
            data["notes"] = Shared(BOARD.notes)
        case "immutable":
            data["notes"] = NOTICE
        case "equal":
            data["notes"] = list(BOARD.notes)


@app.get("/share")
async def share_on_purpose(way: str, context: CurrentContext) -> None:
    share(context, way)
    journal.note("shares", user=context.user_id)
    await journal.gate("has been checked").passed()
    if way == "session":
        await manager.cleanup_context((context.user_id, "with-session"))


@app.get("/refused/{what}")
async def refused(what: str, context: CurrentContext) -> list[str]:
    given: dict[str, dict[str, Any]] = {
        "lock": {"agent_context": {"tools": [{"guard": threading.Lock()}]}},
        "function": {"agent_context": {"read": closure_over([])}},
        "reserved": {"audit_metadata": {"user_id": "bob"}},
        "keys": {"agent_context": {1: "one"}},
    }
    try:
        manager.create_isolated_context(context.user_id, **given[what])
    except InvalidContextError as error:
        return [error.field, error.rule]
    return []


@app.get("/views")
async def views(context: CurrentContext) -> dict[str, Any]:
    """Change what the product shows of a context; it must be a copy."""
    context.audit_metadata["ticket"] = {"tags": ["open"]}
    for shown in (context.to_dict()["audit_metadata"], context.get_audit_trail()):
        shown["ticket"]["tags"].append("changed")
    trail = manager.get_audit_trail(context.user_id)
    assert trail is not None
    trail["events"].clear()
    trail["user_id"] = "bob"
    listed = manager.get_active_contexts()
    next(iter(listed.values())).clear()
    listed.clear()
    again = manager.get_audit_trail(context.user_id)
    assert again is not None
    return {
        "tags": context.audit_metadata["ticket"]["tags"],
        "events": len(again["events"]) > 0,
        "user": again["user_id"],
        "listed": [live["user_id"] for live in manager.get_active_contexts().values()],
    }


@app.get("/configure")
async def configure(context: CurrentContext) -> dict[str, str | None]:
    """Set configuration for one's own context only."""
    before = context.environment.get("PROMISE_MODE")
    context.environment.set("PROMISE_MODE", context.user_id)
    journal.note("configured", user=context.user_id)
    await journal.gate("all have configured").passed()
    return {
        "before": before,
        "after": context.environment.get("PROMISE_MODE"),
        "process": os.environ.get("PROMISE_MODE"),
        "application": manager.environment.get("PROMISE_MODE"),
    }


async def report(request: Request) -> JSONResponse:
    with manager.privileged(reason="the test checks", users=EVERYONE):
        return JSONResponse(
            {
                "isolated": manager.validate_isolation(),
                "findings": [str(replace(finding, held_by=None)) for finding in manager.isolation_report().findings],
            }
        )


async def show_defaults(request: Request) -> JSONResponse:
    return JSONResponse(shown(DEFAULTS))


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify))
door = [Route("/door/report", report), Route("/door/defaults", show_defaults)]
app.add_middleware(Door, manager=manager, journal=journal, routes=door)
