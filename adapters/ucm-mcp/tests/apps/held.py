"""Calls that wait until another request lets them go, and whom the code of a tool runs for."""

import asyncio
import json

from ucm_middleware import UserContextError, current_context

_gates: dict[str, asyncio.Event] = {}


def gate(name: str) -> asyncio.Event:
    return _gates.setdefault(name, asyncio.Event())


def who() -> str:
    """Whom this code runs for, and in a child of which request."""
    try:
        context = current_context()
    except UserContextError as error:
        return json.dumps({"user": type(error).__name__, "depth": -1})
    return json.dumps({"user": context.user_id, "depth": context.operation_depth})
