"""What is put on an agent, once: hooks that watch it, and sub-runs around agents that are tools.

The hooks are those of the agent and not of the run, since ``Agent.as_tool`` gives the agent's own run none of the
latter. They keep nothing of a run and pass everything on, so that runs may share the agent, and so may code that calls
``Runner`` itself.
"""

from collections.abc import Awaitable
from typing import Any, TypeGuard, TypeVar

from agents import Agent, AgentHookContext, AgentHooks, FunctionTool, ModelResponse, RunContextWrapper, Tool
from agents.items import TResponseInputItem
from agents.tool_context import ToolContext

from ucm_middleware import UserContextError, agent_run
from ucm_openai_agents.flow import Flow, current_flow, enter_flow
from ucm_openai_agents.framework import AGENT_OF_TOOL, require_insides
from ucm_openai_agents.tools import flow_of, mark_telling, prepare_function, tells

A = TypeVar("A", bound=Agent[Any])
T = TypeVar("T")

require_insides(FunctionTool)


def guard_agent(agent: A) -> A:
    """Watch an agent, and return it: for apps that call ``Runner`` themselves, with ``context=current_context()``.

    The model is asked, and tools are called, in no other user's context than the run's, and no more once that has
    closed: CrossUserAccessError and ContextClosedError. Its agents as tools and its hand-offs are watched likewise.
    Agents that ``execute_with_agent`` runs are watched without this.
    """
    if not isinstance(agent.hooks, Watch):
        agent.hooks = Watch(agent.hooks)
    for tool in agent.tools:
        if isinstance(tool, FunctionTool) and not tells(tool):
            inner = getattr(tool, AGENT_OF_TOOL, None)
            if is_agent(inner):
                tool.on_invoke_tool = _AgentTool(tool.on_invoke_tool, inner)
            else:
                prepare_function(tool)
    return agent


def is_agent(value: object) -> TypeGuard[Agent[Any]]:
    """Whether something is an agent of the SDK's, but for those of its realtime part."""
    return isinstance(value, Agent)


class Watch(AgentHooks[Any]):
    """Hooks of an agent, in front of those that it has: nothing goes on in another user's context."""

    def __init__(self, inner: AgentHooks[Any] | None) -> None:
        self._inner = inner

    async def on_llm_start(
        self,
        context: RunContextWrapper[Any],
        agent: Agent[Any],
        system_prompt: str | None,
        input_items: list[TResponseInputItem],
    ) -> None:
        if (flow := flow_of(context)) is not None:
            flow.thinking()
        if self._inner is not None:
            await self._inner.on_llm_start(context, agent, system_prompt, input_items)

    async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
        if self._inner is not None:
            await self._inner.on_llm_end(context, agent, response)

    async def on_tool_start(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool) -> None:
        # Here rather than in the tool alone: what a tool raises may be told to the model, and the run go on.
        if (flow := flow_of(context)) is not None:
            if tells(tool):
                flow.require_here()
            else:
                flow.begin_call(tool.name, _call_id(context, tool))
        if self._inner is not None:
            await self._inner.on_tool_start(context, agent, tool)

    async def on_tool_end(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool, result: object) -> None:
        if (flow := current_flow()) is not None:
            flow.end_call(_call_id(context, tool))
        if self._inner is not None:
            await self._inner.on_tool_end(context, agent, tool, result)

    async def on_handoff(self, context: RunContextWrapper[Any], agent: Agent[Any], source: Agent[Any]) -> None:
        guard_agent(agent)
        if (flow := flow_of(context)) is not None:
            context.context = await flow.hand_over(agent.name)
        if self._inner is not None:
            await self._inner.on_handoff(context, agent, source)

    async def on_start(self, context: AgentHookContext[Any], agent: Agent[Any]) -> None:
        if self._inner is not None:
            await self._inner.on_start(context, agent)

    async def on_end(self, context: AgentHookContext[Any], agent: Agent[Any], output: Any) -> None:
        if (flow := current_flow()) is not None:
            flow.has_answered = True
        if self._inner is not None:
            await self._inner.on_end(context, agent, output)


class _AgentTool:
    """An agent as a tool: its run is a sub-run, in a child context that its tools get as theirs."""

    def __init__(self, invoke: Any, agent: Agent[Any]) -> None:
        self._invoke = invoke
        self._agent = agent
        mark_telling(self)

    def __agents_bind_function_tool__(self, tool: FunctionTool) -> "_AgentTool":
        """The SDK ties an invoker to each copy of a tool."""
        bind = getattr(self._invoke, "__agents_bind_function_tool__", None)
        return self if bind is None else _AgentTool(bind(tool), self._agent)

    async def __call__(self, context: ToolContext[Any], arguments: str) -> Any:
        guard_agent(self._agent)
        flow = flow_of(context)
        if flow is None:
            return await self._invoke(context, arguments)
        given = context.context
        try:
            with flow.current.tool(context.tool_name, context.tool_call_id):
                async with agent_run(flow.current.context, self._agent.name) as run:
                    inner = enter_flow(Flow(run))
                    context.context = run.context
                    answer = await within(inner, self._invoke(context, arguments))
                    if inner.refused is not None:
                        raise inner.refused
                    if not inner.has_answered and answer is not None:  # None: it waits for an approval
                        raise UnansweredError(answer)
                    return answer
        except UnansweredError as unanswered:
            # The SDK has made a message for the model of what went wrong: it gets that, and the trail a failed run.
            return unanswered.answer
        except UserContextError as error:
            flow.refuse(error)
            raise
        finally:
            context.context = given
            enter_flow(flow)


class UnansweredError(Exception):
    """The agent came to no answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__("the agent came to no answer")
        self.answer = answer


async def within(flow: Flow, work: Awaitable[T]) -> T:
    """Await the SDK's loop, and end what it has under way when it ends."""
    try:
        result = await work
    except BaseException as error:
        await flow.end(error)
        raise
    await flow.end(None)
    return result


def _call_id(context: RunContextWrapper[Any], tool: Tool) -> str:
    return context.tool_call_id if isinstance(context, ToolContext) else tool.name
