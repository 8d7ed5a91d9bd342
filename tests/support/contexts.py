"""Short words for what many tests do with contexts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ucm_middleware import UserContextManager, UserExecutionContext, managed_user_context

MakeManager = Callable[..., UserContextManager]
"""What the fixture ``make_manager`` is: takes what UserContextManager takes."""


@contextmanager
def running_as(manager: UserContextManager, user_id: str) -> Iterator[UserExecutionContext]:
    """The block is code that runs for this user."""
    with managed_user_context(manager.create_isolated_context(user_id)) as context:
        yield context


def visitor(manager: UserContextManager, ttl: float | None = None) -> UserExecutionContext:
    """What the middleware opens for somebody that it does not know yet."""
    return manager._open_for_connection(None, ttl, None, websocket=False)


def events(manager: UserContextManager, user_id: str, *kinds: str) -> list[dict[str, Any]]:
    """The records of these kinds in the user's trail."""
    trail = manager.get_audit_trail(user_id)
    assert trail is not None
    return [event for event in trail["events"] if event["event"] in kinds]
