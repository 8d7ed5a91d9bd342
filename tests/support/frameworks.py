"""What tests of frameworks share that the port runs as plain async functions: users with a secret each, and who saw
whose. The cases are in ``framework_cases``.
"""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ucm_middleware import (
    UserExecutionContext,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.current import ambient_context

from .waiting import PATIENCE

CROWD = 30
WAIT = "wait"

T = TypeVar("T")
Function = Callable[..., Any]
Agent = Callable[..., Any]
"""A bound method of a framework's agent that was made for one run: an async function, or what gives a stream."""


def secret_of(user_id: str) -> str:
    """What only this user, and whoever runs as this user, may see."""
    return f"<secret of {user_id}>"


def owners(*texts: object) -> set[str]:
    """Whose secrets are in there."""
    return {owner for text in texts for owner in re.findall("<secret of ([^>]+)>", str(text))}


class Witness:
    """Who was there whenever something of a run was seen, by the ambient context. Used from any thread."""

    def __init__(self) -> None:
        self.sightings: list[tuple[str, str, str]] = []
        self.crowd: threading.Barrier | None = None

    def meet(self) -> None:
        """What a model's call that has a prompt waits for first: until all of a crowd are there."""
        if self.crowd is not None:
            self.crowd.wait(PATIENCE)

    async def wait(self) -> None:
        """Until the model is left."""
        try:
            await asyncio.Event().wait()
        finally:
            self.saw("model left", "")

    def saw(self, where: str, text: object) -> None:
        """Whose context it is here, and what is seen in it."""
        inside = ambient_context()
        self.sightings.append((where, "nobody" if inside is None else inside.user_id, str(text)))

    def of(self, where: str) -> list[tuple[str, set[str]]]:
        """As whom it ran, and whose secrets it saw, each time."""
        return [(user, owners(text)) for place, user, text in self.sightings if place == where]

    def require_apart(self) -> None:
        """Each saw no secret but the own."""
        for where, user, text in self.sightings:
            assert owners(text) <= {user}, (where, user, text)


class Framework(Protocol):
    """A framework. Its model first calls every tool it has with the text of the prompt, and then answers with all that
    it was given. Asked to WAIT it calls none, says something and waits until it is left, which it tells the witness as
    "model left".
    """

    def model(self, witness: Witness) -> Any:
        """One for all users, as clients of models are. It tells the witness what it is given, as "model"."""
        ...

    def agent(self, model: Any, tools: Sequence[Function]) -> Agent:
        """What runs a new agent to its end."""
        ...

    def team(self, model: Any, tools: Sequence[Function]) -> Agent:
        """What runs a new agent that has another do its work, which has the tools, in the framework's own way."""
        ...

    def streaming(self, model: Any, tools: Sequence[Function]) -> Agent:
        """What gives the stream of a new agent."""
        ...

    async def talk(self, model: Any, folder: Path, key: str, prompt: str) -> str:
        """The answer of a new agent, which goes on with what the framework keeps under this key in the folder."""
        ...

    def parameters(self, prompt: str) -> dict[str, Any]:
        """What the agent is called with."""
        ...


class Session:
    """Stands for a database session."""

    def query(self) -> str:
        return "rows"


def desk(framework: Framework, model: Any, witness: Witness, *, streaming: bool = False) -> Callable[..., Agent]:
    """A factory of agents with a synchronous and an asynchronous tool, which know for whom they run by the context."""

    def make(_: UserExecutionContext) -> Agent:
        run = current_run()
        tools = [run.wrap_tool(tool) for tool in tools_of(witness)]
        return (framework.streaming if streaming else framework.agent)(model, tools)

    return make


def tools_of(witness: Witness) -> list[Function]:
    def used(tool: str, text: str) -> str:
        witness.saw(tool, text)
        secret = secret_of(current_context().user_id)
        with suppress(LookupError):  # there is no run where the port is left out
            current_run().emit("used", {"tool": tool, "text": secret})
        return f"{tool}: {secret}"

    def look_up(text: str) -> str:
        """Look something up."""
        return used("look_up", text)

    async def note(text: str) -> str:
        """Note something down."""
        await asyncio.sleep(0)
        return used("note", text)

    return [look_up, note]


async def elsewhere(work: Awaitable[T], context: UserExecutionContext | None = None) -> T:
    """What comes of it in a task of its own, in another user's context or in none."""

    async def run() -> T:
        if context is None:
            return await work
        async with managed_user_context(context):
            return await work

    return await asyncio.create_task(run(), context=Context())


async def all_of(stream: AsyncIterable[Any]) -> list[Any]:
    return [item async for item in stream]


def ended(frames: Sequence[str]) -> bool:
    return bool(frames) and json.loads(frames[-1])["type"] == "agent_completed"
