"""What running an agent as one user costs: CPU of a run through ``execute_with_agent`` in what the framework's bare run
takes, each with one call of a tool.

The models are those of the adapters' tests. Frameworks of agents cannot be installed side by side, so each is measured
in an environment of its own: ``tox run -e bench-langgraph``.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from benchmarks.report import finish, parser, show
from benchmarks.timing import Cell, Samples, ratio, take_turns
from ucm_middleware import UserContextManager, managed_user_context

MOST: Final = 1.05
"""What a run through the manager may take, in what a bare run takes."""

TEXT: Final = "how many words are there"

Step = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same agent: run by its framework, and what it is registered and run with."""

    bare: Step
    agent: object
    plugin: object
    parameters: dict[str, Any]


async def count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


def pydantic_ai() -> Pair:
    framework: Any = import_module("pydantic_ai")
    models: Any = import_module("pydantic_ai.models.test")
    agent = framework.Agent(models.TestModel(), tools=[count])
    plugin = import_module("ucm_pydantic_ai").PydanticAI()
    return Pair(lambda: agent.run(TEXT), agent, plugin, {"prompt": TEXT})


def langgraph() -> Pair:
    agents: Any = import_module("langgraph_agents")
    tools: Any = import_module("langchain_core.tools")
    agent = import_module("langchain.agents").create_agent(agents.ToolModel(), [tools.tool(count)])
    given = {"messages": [("user", f"use count: {TEXT}")]}
    return Pair(lambda: agent.ainvoke(given), agent, import_module("ucm_langgraph").LangGraph(), {"input": given})


def openai_agents() -> Pair:
    framework: Any = import_module("agents")
    model = import_module("offline_model").OfflineModel()
    framework.set_tracing_disabled(True)
    agent = framework.Agent("counter", model=model, tools=[framework.function_tool(count)])
    given = f"count(text={TEXT})"
    plugin = import_module("ucm_openai_agents").OpenAIAgents()
    return Pair(lambda: framework.Runner.run(agent, given), agent, plugin, {"input": given})


def google_adk() -> Pair:
    offline: Any = import_module("offline")
    agents: Any = import_module("google.adk.agents.llm_agent")
    sessions: Any = import_module("google.adk.sessions.in_memory_session_service")
    runners: Any = import_module("google.adk.runners")
    content: Any = import_module("google.genai.types")
    agent = agents.LlmAgent(
        name="counter", model=offline.OfflineModel(calls=(("count", {"text": TEXT}),)), tools=[count]
    )
    service = sessions.InMemorySessionService()
    runner = runners.Runner(app_name="bench", agent=agent, session_service=service)

    async def bare() -> object:
        session = await service.create_session(app_name="bench", user_id="alice")
        message = content.Content(role="user", parts=[content.Part(text=TEXT)])
        events = runner.run_async(user_id="alice", session_id=session.id, new_message=message)
        return [event async for event in events]

    plugin = import_module("ucm_google_adk").GoogleADK("bench", session_service=sessions.InMemorySessionService())
    return Pair(bare, agent, plugin, {"message": TEXT})


FRAMEWORKS: Final[dict[str, Callable[[], Pair]]] = {
    "pydantic-ai": pydantic_ai,
    "langgraph": langgraph,
    "openai-agents": openai_agents,
    "google-adk": google_adk,
}


def repeated(runner: asyncio.Runner, step: Step, manager: UserContextManager | None = None) -> Cell:
    """A cell that runs a step on the loop, in a user's context where there is a manager. Of the whole process' CPU:
    frameworks have threads.
    """

    async def run(times: int) -> int:
        start = time.process_time_ns()
        for _ in range(times):
            await step()
        return time.process_time_ns() - start

    async def run_as_alice(manager: UserContextManager, times: int) -> int:
        async with managed_user_context(manager.create_isolated_context("alice")):
            return await run(times)

    return lambda times: runner.run(run(times) if manager is None else run_as_alice(manager, times))


def measure(pair: Pair, rounds: int) -> Samples:
    manager = UserContextManager(plugins=[pair.plugin], secret=secrets.token_urlsafe(32))
    manager.register_agent("agent", lambda context: pair.agent, stateless=True)
    manager.register_agent("nothing", lambda context: nothing, stateless=True)
    with asyncio.Runner() as runner:
        cells = {
            "bare": repeated(runner, pair.bare),
            "through the manager": repeated(
                runner, lambda: manager.execute_with_agent("alice", "agent", pair.parameters), manager
            ),
            "the manager alone": repeated(runner, lambda: manager.execute_with_agent("alice", "nothing"), manager),
        }
        return take_turns(cells, rounds)


async def nothing() -> None:
    """An agent that does nothing: what is left is the port's own."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("framework", choices=sorted(FRAMEWORKS))
    arguments.add_argument("--rounds", type=int, default=101)
    options = arguments.parse_args()
    samples = measure(FRAMEWORKS[options.framework](), options.rounds)
    least = {name: min(values) for name, values in samples.items()}
    cost = ratio(samples, "through the manager", "bare")
    show(
        f"A run of an agent of {options.framework}, with one call of a tool",
        ("", "us of CPU, at least", "x bare"),
        [(name, f"{value / 1000:.0f}", f"{ratio(samples, name, 'bare'):.3f}") for name, value in least.items()],
    )
    missed = [f"{options.framework}: {cost:.3f} x bare, and {MOST} are allowed"] if cost > MOST else []
    finish(options, {"framework": options.framework, "x_bare": cost, "least_ns": least}, missed)


if __name__ == "__main__":
    main()
