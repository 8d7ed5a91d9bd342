"""One run: what it tells of, whose contexts its agents and tools have, and what is refused before it begins."""

import asyncio
import json
from typing import Any

import pytest
from agents import (
    Agent,
    AgentHookContext,
    AgentHooks,
    FunctionTool,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelResponse,
    RunContextWrapper,
    RunHooks,
    Tool,
    Usage,
    function_tool,
)
from agents.decorators import input_guardrail
from agents.guardrail import GuardrailFunctionOutput
from agents.tool_context import ToolContext
from offline_model import OfflineModel
from offline_team import EVERYTHING, SECRET, Team, secret_of
from openai.types.responses import ResponseOutputItem
from pydantic import TypeAdapter

from support.events import connect
from ucm_middleware import (
    AgentError,
    AgentParametersError,
    AgentTimeoutError,
    ContextLimitError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    current_run,
)
from ucm_openai_agents import OpenAIAgents


def manager_of(agent: Agent[Any], plugin: OpenAIAgents | None = None, **settings: Any) -> UserContextManager:
    manager = UserContextManager(plugins=[plugin or OpenAIAgents()], secret=SECRET, **settings)
    manager.register_agent("front", lambda _: agent, stateless=True)
    return manager


async def told_of(manager: UserContextManager, message: str) -> list[tuple[str, str, str | None]]:
    """What alice's connection gets of a run: the event, the agent, the tool."""
    _, client, _ = connect(manager, "alice")
    await manager.execute_with_agent("alice", "front", {"input": message})
    return [(each["type"], each["data"].get("agent"), each["data"].get("tool")) for each in client.envelopes]


async def test_a_run_tells_of_its_agents_and_tools_as_it_goes() -> None:
    team = Team()
    events = await told_of(team.manager(OpenAIAgents()), "recall(); ask(input=arecall()); handoff to billing; recall()")
    assert [each for each in events if each[0] != "recalled"] == [
        ("agent_started", "front", None),
        ("agent_thinking", "front", None),
        ("tool_executing", "front", "recall"),
        ("tool_completed", "front", "recall"),
        ("agent_thinking", "front", None),
        ("tool_executing", "front", "ask"),
        ("agent_started", "helper", None),
        ("agent_thinking", "helper", None),
        ("tool_executing", "helper", "arecall"),
        ("tool_completed", "helper", "arecall"),
        ("agent_thinking", "helper", None),
        ("agent_completed", "helper", None),
        ("tool_completed", "front", "ask"),
        ("agent_thinking", "front", None),
        ("agent_started", "billing", None),
        ("agent_thinking", "billing", None),
        ("tool_executing", "billing", "recall"),
        ("tool_completed", "billing", "recall"),
        ("agent_thinking", "billing", None),
        ("agent_completed", "billing", None),
        ("agent_completed", "front", None),
    ]


async def test_agents_as_tools_and_hand_offs_form_a_tree_of_contexts_of_the_same_user() -> None:
    seen: dict[str, UserExecutionContext] = {}
    deep: dict[str, tuple[int, str | None]] = {}

    @function_tool
    def look(wrapper: RunContextWrapper[UserExecutionContext], name: str) -> str:
        seen[name] = wrapper.context
        deep[name] = wrapper.context.operation_depth, wrapper.context.parent_request_id
        return wrapper.context.user_id

    model = OfflineModel()
    inner = Agent[Any]("inner", model=model, tools=[look])
    middle = Agent[Any]("middle", model=model, tools=[look, inner.as_tool("inner", "")])
    other = Agent[Any]("other", model=model, tools=[look])
    last = Agent[Any]("last", model=model, tools=[look], handoffs=[])
    other.handoffs.append(last)
    front = Agent[Any]("front", model=model, tools=[look, middle.as_tool("middle", "")], handoffs=[other])
    nested = "look(name~middle)|inner(input~look(name!inner))"
    await manager_of(front).execute_with_agent(
        "alice",
        "front",
        {
            "input": f"look(name=front); middle(input={nested}); look(name=back); handoff to other; look(name=other); "
            "handoff to last; look(name=last)"
        },
    )
    assert {context.user_id for context in seen.values()} == {"alice"}
    assert seen["front"] is seen["back"]
    ids = {name: context.request_id for name, context in seen.items()}
    assert deep == {
        "front": (1, deep["front"][1]),
        "back": (1, deep["front"][1]),
        "middle": (2, ids["front"]),
        "inner": (3, ids["middle"]),
        "other": (2, ids["front"]),
        "last": (2, ids["front"]),
    }
    assert all(not context.is_open for context in seen.values())


async def test_agents_as_tools_nest_ten_deep_and_no_deeper() -> None:
    model = OfflineModel()
    agent = Agent[Any]("front", model=model)
    agent.tools.append(agent.as_tool("again", "asks itself"))
    # Each level's message is the rest of its caller's.
    model.answer = lambda items: "again(input=on)"
    manager = manager_of(agent)
    with pytest.raises(ContextLimitError) as caught:
        await manager.execute_with_agent("alice", "front", {"input": "on"})
    assert any("front" in note for note in caught.value.__notes__)
    assert len(model.seen) == 10
    assert manager.get_active_contexts() == {}


async def test_a_conversation_handed_back_and_forth_does_not_nest() -> None:
    model = OfflineModel()
    one, two = Agent[Any]("front", model=model), Agent[Any]("two", model=model)
    one.handoffs.append(two)
    two.handoffs.append(one)
    manager = manager_of(one)
    _, client, _ = connect(manager, "alice")
    given = {"input": "; ".join(["handoff to two; handoff to front"] * 8) + "; say done", "max_turns": None}
    assert (await manager.execute_with_agent("alice", "front", given)).final_output == "done"
    depths = [each["data"]["depth"] for each in client.envelopes if each["type"] == "agent_started"]
    assert depths == [1] + [2] * 16
    kinds = [each["type"] for each in client.envelopes if each["type"] in ("agent_started", "agent_completed")]
    assert kinds == ["agent_started", *["agent_started", "agent_completed"] * 16, "agent_completed"]


async def test_a_tool_that_fails_says_so_and_the_model_hears_of_it() -> None:
    @function_tool
    def breaks() -> str:
        raise OSError("disk full")

    model = OfflineModel()
    agent = Agent[Any]("front", model=model, tools=[breaks])
    manager = manager_of(agent)
    _, client, _ = connect(manager, "alice")
    result = await manager.execute_with_agent("alice", "front", {"input": "breaks()"})
    assert "An error occurred while running the tool" in result.final_output  # which is the SDK's own text
    (ended,) = [each["data"] for each in client.envelopes if each["type"] == "tool_completed"]
    assert (ended["error"], ended["reason"]) == ("OSError", "failed")


async def test_a_sub_agent_that_fails_is_a_failed_run_and_the_model_hears_of_it() -> None:
    @function_tool(failure_error_function=None)
    def breaks() -> str:
        raise OSError("disk full")

    model = OfflineModel()
    helper = Agent[Any]("helper", model=model, tools=[breaks])
    agent = Agent[Any]("front", model=model, tools=[helper.as_tool("ask", "")])
    manager = manager_of(agent)
    _, client, _ = connect(manager, "alice")
    result = await manager.execute_with_agent("alice", "front", {"input": "ask(input=breaks())"})
    assert "An error occurred while running the tool" in result.final_output
    ends = [(each["type"], each["data"]["agent"]) for each in client.envelopes if "agent_" in each["type"]]
    assert ("agent_failed", "helper") in ends
    assert ends[-1] == ("agent_completed", "front")


async def test_tools_that_are_no_functions_are_told_of_too() -> None:
    async def invoke(context: ToolContext[Any], arguments: str) -> str:
        return f"{json.loads(arguments)['k']} for {current_context().user_id}"

    schema = {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]}
    tool = FunctionTool("custom", "", schema, invoke, strict_json_schema=False)
    agent = Agent[Any]("front", model=OfflineModel(), tools=[tool])
    events = await told_of(manager_of(agent), "custom(k=1)")
    assert ("tool_executing", "front", "custom") in events
    assert ("tool_completed", "front", "custom") in events


class Greeter:
    """Tools of every shape that the SDK makes tools of."""

    def method(self, name: str, *, times: int = 1) -> str:
        """Greets."""
        return f"hi {name}" * times + f" from {current_run().agent_name}"

    async def amethod(self, name: str) -> str:
        return f"hi {name} from {current_run().agent_name}"

    def __call__(self, name: str) -> str:
        return f"hi {name} from {current_run().agent_name}"


def plain(name: str) -> str:
    return f"hi {name} from {current_run().agent_name}"


@pytest.mark.parametrize("shape", ["function", "method", "asynchronous method", "object", "without strictness"])
async def test_tools_of_every_shape_tell_of_themselves_and_stay_what_they_were(shape: str) -> None:
    greeter = Greeter()
    tools: dict[str, FunctionTool] = {
        "function": function_tool(plain),
        "method": function_tool(greeter.method, strict_mode=False),
        "asynchronous method": function_tool(greeter.amethod),
        "object": function_tool(greeter, name_override="greeter"),
        "without strictness": function_tool(plain, strict_mode=False),
    }
    tool = tools[shape]
    before = tool.name, tool.description, tool.params_json_schema
    agent = Agent[Any]("front", model=OfflineModel(), tools=[tool])
    manager = manager_of(agent)
    for _ in range(2):
        result = await manager.execute_with_agent("alice", "front", {"input": f"{tool.name}(name=you)"})
        assert result.final_output == "done: hi you from front"
    assert (tool.name, tool.description, tool.params_json_schema) == before
    events = await told_of(manager, f"{tool.name}(name=you)")
    assert [each[2] for each in events if each[0] == "tool_executing"] == [tool.name]


def test_a_function_behind_a_tool_can_still_be_called_by_itself() -> None:
    from ucm_openai_agents import guard_agent

    def double(number: int) -> int:
        return number * 2

    tool = function_tool(double)
    guard_agent(Agent[Any]("front", tools=[tool]))
    function: Any = tool.__wrapped__
    assert function(4) == 8


async def test_hooks_of_the_application_s_are_called_as_before() -> None:
    calls: list[str] = []

    class OfRuns(RunHooks[Any]):
        async def on_tool_start(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool) -> None:
            calls.append(f"run's {tool.name} {current_context().user_id}")

    class OfAgents(AgentHooks[Any]):
        async def on_start(self, context: AgentHookContext[Any], agent: Agent[Any]) -> None:
            calls.append("start")

        async def on_end(self, context: AgentHookContext[Any], agent: Agent[Any], output: Any) -> None:
            calls.append(f"end {output}")

        async def on_handoff(self, context: RunContextWrapper[Any], agent: Agent[Any], source: Agent[Any]) -> None:
            calls.append(f"{source.name} to {agent.name}")

        async def on_tool_start(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool) -> None:
            calls.append(f"agent's {tool.name}")

        async def on_tool_end(
            self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool, result: object
        ) -> None:
            calls.append(f"{tool.name} ended")

        async def on_llm_start(
            self, context: RunContextWrapper[Any], agent: Agent[Any], system_prompt: str | None, input_items: list[Any]
        ) -> None:
            calls.append("asked")

        async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
            calls.append("answered")

    team = Team()
    team.front.hooks = OfAgents()
    manager = team.manager(OpenAIAgents(hooks=OfRuns()))
    for _ in range(2):  # and no more often, the second time
        calls.clear()
        await manager.execute_with_agent("alice", "front", {"input": "recall(); say bye"})
        assert calls == [
            *("start", "asked", "answered", "run's recall alice", "agent's recall", "recall ended"),
            *("asked", "answered", "end bye"),
        ]
    calls.clear()
    await manager.execute_with_agent("alice", "front", {"input": "handoff to billing"})
    assert "front to billing" in calls


async def test_what_the_agent_raises_goes_its_way() -> None:
    @input_guardrail
    async def never(context: RunContextWrapper[Any], agent: Agent[Any], given: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(None, tripwire_triggered=True)

    agent = Agent[Any]("front", model=OfflineModel(), input_guardrails=[never])
    with pytest.raises(InputGuardrailTripwireTriggered):
        await manager_of(agent).execute_with_agent("alice", "front", {"input": "say hello"})
    team = Team()
    with pytest.raises(MaxTurnsExceeded):
        await team.manager(OpenAIAgents()).execute_with_agent(
            "alice", "front", {"input": "recall(); recall(); recall()", "max_turns": 2}
        )


async def test_an_agent_that_never_ends_is_cut_off_with_its_sub_runs() -> None:
    asked = asyncio.Event()

    async def never() -> None:
        asked.set()
        await asyncio.Event().wait()

    team = Team()
    manager = team.manager(OpenAIAgents())
    _, client, _ = connect(manager, "alice")
    team.billing.model = OfflineModel(before=never)
    with pytest.raises(AgentTimeoutError, match="front"):
        await manager.execute_with_agent("alice", "front", {"input": "handoff to billing"}, timeout=0.2)
    assert asked.is_set()
    ends = [(each["type"], each["data"]["agent"]) for each in client.envelopes][-2:]
    assert sorted(ends) == [("agent_failed", "billing"), ("agent_failed", "front")]


async def test_other_runs_go_on_when_one_fails() -> None:
    team = Team()
    manager = team.manager(OpenAIAgents())
    bad = manager.execute_with_agent("mallory", "front", {"input": "nowhere()"})
    good = [manager.execute_with_agent(f"user-{n}", "front", {"input": EVERYTHING}) for n in range(4)]
    failed, *results = await asyncio.gather(bad, *good, return_exceptions=True)
    assert isinstance(failed, Exception)
    assert [result.final_output for result in results if not isinstance(result, BaseException)] == [
        f"done: {secret_of(f'user-{n}')}" for n in range(4)
    ]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "input is absent"),
        ({"input": ""}, "neither a text"),
        ({"input": []}, "neither a text"),
        ({"input": ["hello"]}, "neither a text"),
        ({"input": 7}, "neither a text"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "an item on OpenAI's server"),
        ({"input": [{"role": "user", "content": "hi"}, {"id": "msg_1"}]}, "give the item itself"),
        *(
            ({"input": [{"role": "user", "content": "hi"}, item]}, "an item on OpenAI's server")
            for item in (
                {"type": None, "id": "msg_1", "role": None},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"},
                {"id": "msg_1", "role": "assistant"},
                {"type": "image_generation_call", "id": "ig_1"},
                {"type": "image_generation_call", "id": "ig_1", "result": None, "status": "completed"},
                {"type": "image_generation_call", "id": "ig_1", "result": "", "size": "1024x1024"},
                {"type": "reasoning", "id": "rs_1"},
                {"type": "computer_call", "id": "cu_1", "status": "completed"},
                {"type": "code_interpreter_call", "id": "ci_1", "container_id": "cntr_1"},
                {"type": "web_search_call", "id": "ws_1", "status": "completed"},
                {"type": "of_tomorrow", "id": "ot_1"},
                {"type": ["message"], "id": "msg_1"},
            )
        ),
        ({"input": "hi", "max_turns": 0}, "max_turns"),
        ({"input": "hi", "max_turns": True}, "max_turns"),
        ({"input": "hi", "session_id": 7}, "session_id is a int"),
        ({"input": "hi", "session_id": "chat"}, "sessions=lambda key"),
        ({"input": "hi", "prompt": "hi"}, "not known: prompt; give input, session_id, max_turns"),
        ({"input": "hi", "<script>": "hi"}, "not known; give"),
        ({"input": "hi", "conversation_id": "conv_1"}, "conversation_id names a conversation on OpenAI's server"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "give a session_id"),
    ],
)
async def test_parameters_that_do_not_fit_are_refused_before_the_model_is_asked(given: Any, found: str) -> None:
    team = Team()
    manager = team.manager(OpenAIAgents())
    with pytest.raises(AgentParametersError) as caught:
        await manager.execute_with_agent("alice", "front", given)
    assert found in str(caught.value)
    assert "'front'" in str(caught.value)
    with pytest.raises(AgentParametersError):
        async with manager.stream_with_agent("alice", "front", given) as stream:
            [item async for item in stream]
    assert team.model.seen == []


async def test_input_items_are_taken_as_the_sdk_takes_them() -> None:
    team = Team()
    items = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]
    given = {"input": [*items, {"role": "user", "content": "say two"}]}
    assert (await team.manager(OpenAIAgents()).execute_with_agent("alice", "front", given)).final_output == "two"


async def test_what_a_model_gave_may_be_given_again() -> None:
    """As the SDK makes input items of it, with their ids."""
    output: list[dict[str, Any]] = [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": ""},
        {"type": "image_generation_call", "id": "ig_1", "result": "aGk=", "status": "completed"},
        {"type": "code_interpreter_call", "id": "ci_1", "container_id": "cntr_1", "code": "1", "status": "completed"},
        {"type": "web_search_call", "id": "ws_1", "action": {"type": "search"}, "status": "completed"},
        {"type": "file_search_call", "id": "fs_1", "queries": ["tea"], "status": "completed"},
        {"type": "mcp_list_tools", "id": "ml_1", "server_label": "shop", "tools": []},
        {"type": "compaction", "id": "cm_1", "encrypted_content": "gAAA"},
        {
            "type": "computer_call",
            "id": "cu_1",
            "call_id": "c2",
            "action": {"type": "wait"},
            "pending_safety_checks": [],
            "status": "completed",
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "one", "annotations": []}],
        },
    ]
    parsed = TypeAdapter[list[Any]](list[ResponseOutputItem]).validate_python(output)
    items = ModelResponse(output=parsed, usage=Usage(), response_id=None).to_input_items()
    assert [item.get("id") for item in items] == [item["id"] for item in output]
    asked = [*items, {"type": "function_call_output", "call_id": "c1", "output": ""}]
    given = {"input": [*asked, {"role": "user", "content": "say two"}]}
    result = await Team().manager(OpenAIAgents()).execute_with_agent("alice", "front", given)
    assert result.final_output == "two"


async def test_an_agent_of_another_framework_is_left_to_others() -> None:
    manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
    manager.register_agent("other", lambda _: object())
    with pytest.raises(AgentError, match="nothing that any plugin"):
        await manager.execute_with_agent("alice", "other", {"input": "hi"})


async def test_an_agent_that_an_earlier_run_had_is_refused_unless_it_is_said_to_be_stateless() -> None:
    team = Team()
    manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
    manager.register_agent("shared", lambda _: team.front)

    async def slow() -> None:
        await asyncio.sleep(0)

    team.front.model = OfflineModel(before=slow)
    runs = [manager.execute_with_agent(user, "shared", {"input": "say hi"}) for user in ("alice", "bob")]
    results = await asyncio.gather(*runs, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["RunResult", "AgentError"]
    manager.register_agent("fresh", lambda _: team.front.clone())
    for user in ("alice", "bob"):
        assert (await manager.execute_with_agent(user, "fresh", {"input": "say hi"})).final_output == "hi"
