"""What tests of agents share: what is on record of runs, and agents that wait."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_middleware.ambient import enter, leave
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.testing.waiting import PATIENCE

Phase = tuple[Any, ...]


def phases(ledger: RecordingLedger, user: str = "alice") -> list[Phase]:
    """What is on record of a user's runs: each phase with the agent, the tool where it is one's, and why not well."""
    told = []
    for record in ledger.select("agent_run", user=user):
        data = dict(record.data)
        told.append(tuple(part for part in (data["phase"], data["agent"], data.get("tool"), record.reason) if part))
    return told


def always(agent: Any) -> Callable[[UserExecutionContext], Any]:
    """A factory that gives the same agent each time."""
    return lambda context: agent


def stateless(manager: UserContextManager, **agents: Callable[..., Awaitable[Any] | Any]) -> None:
    """Register functions as agents that keep nothing of a run."""
    for name, agent in agents.items():
        manager.register_agent(name, always(agent), stateless=True)


@contextmanager
def astray(manager: UserContextManager, user_id: str) -> Iterator[UserExecutionContext]:
    """The block runs in another user's context, as code does that a shared loop or a generator brings there."""
    with manager.privileged(reason="set up", users=[user_id]):
        context = manager.create_isolated_context(user_id)
    token = enter(context)
    try:
        yield context
    finally:
        leave(token)
        context.close()


class Waiting:
    """An agent that says when it runs, and waits until it is let go, in whichever of its runs."""

    def __init__(self) -> None:
        self.started = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def __call__(self) -> str:
        self.started.release()
        await self.go_on.wait()
        return "done"


class Blocking:
    """A tool that blocks its thread until it is let go, and then tries what it is given."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.ended = threading.Event()
        self.outcome: object = None

    def __call__(self, attempt: Callable[[], object]) -> None:
        self.started.set()
        self.go_on.wait(PATIENCE)  # a test that fails must not hang in its thread
        try:
            self.outcome = attempt()
        except Exception as error:  # noqa: BLE001 - what the test asks for
            self.outcome = error
        self.ended.set()
