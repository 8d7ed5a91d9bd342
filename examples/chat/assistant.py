"""The agent: one for all users. What is a user's own is given to each of its runs."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic_ai import Agent, RunContext

from examples.chat.notes import Notes, open_notes
from examples.chat.offline import OFFLINE
from ucm_middleware import UserExecutionContext
from ucm_pydantic_ai import Prepared

NEWEST = 20
MODEL = os.environ.get("CHAT_MODEL", "")
"""A real model as Pydantic AI names it, such as "openai:gpt-5"; the one that needs no network where it is empty."""


@dataclass(frozen=True, slots=True)
class Deps:
    """What the tools of one run have. ``notes`` is a handle: it ends with the run."""

    notes: Notes


agent = Agent(
    MODEL or OFFLINE,
    deps_type=Deps,
    instructions="Answer briefly, in plain text. The user's notes may help: read them. Keep what you are to remember.",
)


@agent.tool
def remember(ctx: RunContext[Deps], note: str) -> int:
    """Keep a note for the user. Returns how many there are."""
    return ctx.deps.notes.add(note)  # in a thread, as the framework runs what is no coroutine


@agent.tool
async def read_notes(ctx: RunContext[Deps]) -> list[str]:
    """The user's newest notes, the oldest first."""
    return await asyncio.to_thread(ctx.deps.notes.newest, NEWEST)


def assistant(folder: Path, context: UserExecutionContext) -> Prepared:
    """What runs in one run, whose context this is."""
    return Prepared(agent, deps=Deps(open_notes(folder, context)))
