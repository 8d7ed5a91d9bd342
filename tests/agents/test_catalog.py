"""Registering agents, and what a factory may give."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.agents import always, stateless
from ucm_middleware import (
    AgentError,
    AgentParametersError,
    ConfigurationError,
    UnknownAgentError,
    UserContextManager,
    UserExecutionContext,
)


class Agent:
    """Remembers what it was asked, as many frameworks' agents do."""

    def __init__(self) -> None:
        self.memory: list[str] = []

    async def __call__(self, prompt: str) -> list[str]:
        self.memory.append(prompt)
        return self.memory

    async def ask(self, prompt: str) -> list[str]:
        return await self(prompt)


class Slotted:
    """Cannot be referred to weakly."""

    __slots__ = ()

    async def __call__(self, deeper: Callable[[], Any] | None = None) -> str:
        return "done"


async def test_each_run_has_an_agent_of_its_own(manager: UserContextManager) -> None:
    manager.register_agent("agent", lambda context: Agent())
    assert await manager.execute_with_agent("alice", "agent", {"prompt": "hers"}) == ["hers"]
    assert await manager.execute_with_agent("bob", "agent", {"prompt": "his"}) == ["his"]


async def test_a_factory_is_given_the_run_s_own_context_and_may_wait(manager: UserContextManager) -> None:
    seen: list[UserExecutionContext] = []

    async def factory(context: UserExecutionContext) -> Agent:
        seen.append(context)
        return Agent()

    manager.register_agent("agent", factory)
    await manager.execute_with_agent("alice", "agent", {"prompt": "x"})
    assert (seen[0].user_id, seen[0].operation_depth) == ("alice", 1)


class Prepared:
    """What an adapter may let a factory return: an agent, and more for its run."""

    def __init__(self, agent: Callable[[str], Any]) -> None:
        self.agent = agent

    @property
    def __ucm_agent__(self) -> object:
        return self.agent

    async def __call__(self, prompt: str) -> Any:
        return await self.agent(prompt)


@pytest.mark.parametrize("what", ["object", "method", "function", "prepared", "prepared method"])
async def test_one_that_two_runs_would_share_is_refused(manager: UserContextManager, what: str) -> None:
    agent = Agent()

    async def function(prompt: str) -> list[str]:
        return await agent(prompt)

    shared: dict[str, Callable[[UserExecutionContext], Any]] = {
        "object": always(agent),
        "method": lambda context: agent.ask,
        "function": always(function),
        "prepared": lambda context: Prepared(agent),
        "prepared method": lambda context: Prepared(agent.ask),
    }
    manager.register_agent("agent", shared[what])
    await manager.execute_with_agent("alice", "agent", {"prompt": "hers"})
    with pytest.raises(AgentError, match=r"agent 'agent': its factory returned a \w+ that another run had.*stateless"):
        await manager.execute_with_agent("bob", "agent", {"prompt": "his"})
    assert agent.memory == ["hers"]


async def test_also_one_that_cannot_be_referred_to_weakly(manager: UserContextManager) -> None:
    agent = Slotted()
    manager.register_agent("agent", always(agent))

    async def outer() -> None:
        await manager.execute_with_agent("alice", "agent")

    class Again(Slotted):
        __slots__ = ()

        async def __call__(self, deeper: Any = None) -> str:
            return str(await manager.execute_with_agent("alice", "nested"))

    manager.register_agent("nested", always(Again()))
    with pytest.raises(AgentError, match="another run had"):
        await manager.execute_with_agent("alice", "nested")
    assert await manager.execute_with_agent("alice", "agent") == "done"


async def test_a_new_one_at_the_address_of_one_that_is_gone_is_new(manager: UserContextManager) -> None:
    manager.register_agent("agent", lambda context: Agent())
    for _ in range(50):  # CPython gives the same address again and again
        assert await manager.execute_with_agent("alice", "agent", {"prompt": "x"}) == ["x"]


async def test_a_stateless_one_may_be_the_same(manager: UserContextManager) -> None:
    stateless(manager, agent=Slotted())
    for _ in range(3):
        assert await manager.execute_with_agent("alice", "agent") == "done"


async def test_a_factory_that_raises_is_named_and_its_error_kept(manager: UserContextManager) -> None:
    def factory(context: UserExecutionContext) -> Agent:
        raise OSError("no key for the model")

    manager.register_agent("agent", factory)
    stateless(manager, other=Slotted())
    with pytest.raises(AgentError, match="agent 'agent': its factory raised OSError") as raised:
        await manager.execute_with_agent("alice", "agent")
    assert isinstance(raised.value.__cause__, OSError)
    assert await manager.execute_with_agent("alice", "other") == "done"


@pytest.mark.parametrize(
    ("agent", "problem"),
    [
        (None, "its factory returned None"),
        ("a text", "a str is nothing that any plugin of this manager runs"),
        (len, "parameters do not fit"),
        (lambda: 7, "gave a int, and is to be asynchronous"),
    ],
)
async def test_what_is_no_agent_is_told(manager: UserContextManager, agent: object, problem: str) -> None:
    manager.register_agent("agent", always(agent))
    with pytest.raises(AgentError, match=rf"agent 'agent': .*{problem}"):
        await manager.execute_with_agent("alice", "agent")


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({}, "missing a required argument: 'prompt'"),
        ({"prompt": "x", "promt": "y"}, "unexpected keyword argument 'promt'"),
        ("prompt", "its parameters are a str"),
        ({"prompt": threading.Lock()}, "parameters"),
        ({7: "x"}, "parameters"),
    ],
)
async def test_parameters_that_do_not_fit_are_told(manager: UserContextManager, parameters: Any, problem: str) -> None:
    manager.register_agent("agent", lambda context: Agent())
    with pytest.raises(AgentParametersError, match=rf"agent 'agent': .*{problem}"):
        await manager.execute_with_agent("alice", "agent", parameters)


async def test_an_unknown_agent_is_told_with_those_that_are_known(manager: UserContextManager) -> None:
    with pytest.raises(UnknownAgentError, match="known: none"):
        await manager.execute_with_agent("alice", "helper")
    stateless(manager, writer=Slotted(), planner=Slotted())
    with pytest.raises(
        UnknownAgentError, match=r"agent 'helper': none is registered.*known: planner, writer"
    ) as raised:
        await manager.execute_with_agent("alice", "helper")
    assert isinstance(raised.value, KeyError)
    for odd in (7, "x" * 10_000):
        with pytest.raises(UnknownAgentError) as raised:
            await manager.execute_with_agent("alice", odd)  # type: ignore[arg-type]
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 129, 7])
def test_a_bad_name_is_refused(manager: UserContextManager, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="agent's name is printable text"):
        manager.register_agent(name, always(Agent()))


@pytest.mark.parametrize("factory", ["a text", lambda: Agent(), Agent])
def test_what_is_no_factory_is_refused(manager: UserContextManager, factory: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"factory of agent 'agent'.*lambda context"):
        manager.register_agent("agent", factory)


def test_a_name_is_taken_once(manager: UserContextManager) -> None:
    manager.register_agent("agent", lambda context: Agent())
    with pytest.raises(ConfigurationError, match="registered already"):
        manager.register_agent("agent", lambda context: Agent())


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), True, "5"])
async def test_a_bad_timeout_is_refused(manager: UserContextManager, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout must be a number"):
        manager.register_agent("agent", always(Agent()), timeout=timeout)
    stateless(manager, agent=Slotted())
    with pytest.raises(ConfigurationError, match="timeout must be a number"):
        await manager.execute_with_agent("alice", "agent", timeout=timeout)
