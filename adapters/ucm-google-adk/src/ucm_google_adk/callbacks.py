"""UserContextPlugin: what ADK tells of a run, told on; and a look, at each step, at whose context it happens in."""

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final
from weakref import ReferenceType, WeakKeyDictionary, ref

from google.adk.agents.base_agent import BaseAgent
from google.adk.agents.callback_context import CallbackContext
from google.adk.agents.invocation_context import InvocationContext
from google.adk.events.event import Event
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.plugins.base_plugin import BasePlugin
from google.adk.tools.base_tool import BaseTool
from google.adk.tools.tool_context import ToolContext
from google.genai import types

from ucm_google_adk.owners import require_same_user
from ucm_google_adk.threads import watch_threads
from ucm_middleware import (
    AgentRun,
    ContextClosedError,
    ContextNotFoundError,
    ToolCall,
    agent_run,
    current_context,
    current_run,
)

_NAME: Final = "ucm_middleware"


@dataclass(slots=True, eq=False)
class _SubRun:
    """The run of a sub-agent, in the Context that it was entered in."""

    agent: str
    invocation: InvocationContext
    block: AbstractAsyncContextManager[AgentRun]
    run: AgentRun
    task: "asyncio.Task[Any] | None"
    within: "ReferenceType[AgentRun]"
    outer: "_SubRun | None"

    @property
    def is_stale(self) -> bool:
        """ADK ends an agent without a word when a callback or a tool has ended its invocation."""
        return self.invocation.end_invocation


_innermost: ContextVar[_SubRun | None] = ContextVar("ucm_google_adk_sub_run", default=None)


class UserContextPlugin(BasePlugin):
    """For ``App(plugins=[UserContextPlugin()])``: the same for all users.

    A message, an agent, a model's or a tool's call and an event are refused with CrossUserAccessError where the
    session is another user's than the running context's, and with ContextNotFoundError outside of a context; ADK wraps
    what a plugin raises in a RuntimeError. In a run (``execute_with_agent`` or ``agent_run``) events tell of it,
    sub-agents and agents as tools are runs of their own, and the threads of tools are watched.
    """

    def __init__(self) -> None:
        super().__init__(name=_NAME)
        self._calls: WeakKeyDictionary[ToolContext, ToolCall] = WeakKeyDictionary()
        # By the run that ADK was started in; weakly, since nobody may tell of its end.
        self._open: WeakKeyDictionary[AgentRun, list[_SubRun]] = WeakKeyDictionary()

    def is_run_itself(self, agent: BaseAgent, invocation: InvocationContext) -> bool:
        """Whether an agent is what the run around it was begun for, and no sub-agent."""
        del agent, invocation
        return False

    def run_here(self, invocation: InvocationContext, action: str) -> AgentRun | None:
        """The innermost run that this code belongs to, if there is one, after a look at whose context it is.

        Raises CrossUserAccessError unless the session is the running user's, and ContextNotFoundError outside.
        """
        require_same_user(current_context(), invocation.session.user_id, action)
        try:
            return current_run()
        except ContextNotFoundError:
            return None

    def outermost(self, run: AgentRun) -> AgentRun:
        """The run that ADK was started in, which ``run`` is or is a sub-run of."""
        innermost = _innermost.get()
        within = None if innermost is None else innermost.within()
        return run if within is None or within.has_ended else within

    def innermost(self) -> AgentRun | None:
        """The run of the sub-agent that this code is in."""
        innermost = _innermost.get()
        return innermost.run if innermost is not None and self._is_open(innermost) else None

    # Whose it is.

    async def on_user_message_callback(
        self, *, invocation_context: InvocationContext, user_message: types.Content
    ) -> types.Content | None:
        """A message comes in."""
        del user_message
        self.run_here(invocation_context, "message to an agent")
        return None

    async def before_run_callback(self, *, invocation_context: InvocationContext) -> types.Content | None:
        """An invocation begins."""
        self.run_here(invocation_context, "run of an agent")
        return None

    async def on_event_callback(self, *, invocation_context: InvocationContext, event: Event) -> Event | None:
        """An event goes to whoever reads."""
        del event
        if (run := self.run_here(invocation_context, "event of an agent")) is not None:
            await self._sweep(run)
        return None

    async def after_run_callback(self, *, invocation_context: InvocationContext) -> None:
        """An invocation has ended."""
        if (run := self.run_here(invocation_context, "end of an agent")) is not None:
            await self._sweep(run)

    # Agents.

    async def before_agent_callback(
        self, *, agent: BaseAgent, callback_context: CallbackContext
    ) -> types.Content | None:
        """An agent begins."""
        invocation = _invocation_of(callback_context)
        run = self.run_here(invocation, f"agent {agent.name}")
        if run is None:
            return None
        await self._sweep(run)
        while (innermost := _innermost.get()) is not None and innermost.is_stale and self._is_open(innermost):
            await self._leave(innermost, None)
        if self.is_run_itself(agent, invocation):
            return None
        task = asyncio.current_task()
        if innermost is not None and self._is_open(innermost) and _is_again(innermost, agent, invocation, task):
            innermost.invocation = invocation  # it goes on after what it had delegated
            return None
        block = agent_run(current_context(), agent.name)
        entered_run = await block.__aenter__()
        outermost = self.outermost(run)
        entered = _SubRun(agent.name, invocation, block, entered_run, task, ref(outermost), innermost)
        self._open.setdefault(outermost, []).append(entered)
        _innermost.set(entered)
        return None

    async def after_agent_callback(
        self, *, agent: BaseAgent, callback_context: CallbackContext
    ) -> types.Content | None:
        """An agent has ended, or is cancelled."""
        del callback_context
        raised = sys.exc_info()[1]
        await self._agent_ended(agent, raised if isinstance(raised, asyncio.CancelledError) else None)
        return None

    async def on_agent_error_callback(
        self, *, agent: BaseAgent, callback_context: CallbackContext, error: Exception
    ) -> None:
        """An agent has failed."""
        del callback_context
        await self._agent_ended(agent, error)

    async def _agent_ended(self, agent: BaseAgent, error: BaseException | None) -> None:
        innermost = _innermost.get()
        if innermost is not None and innermost.agent == agent.name and self._is_open(innermost):
            await self._leave(innermost, error)

    def _is_open(self, sub_run: _SubRun) -> bool:
        within = sub_run.within()
        return within is not None and sub_run in self._open.get(within, ())

    async def _leave(self, sub_run: _SubRun, error: BaseException | None) -> None:
        if (within := sub_run.within()) is not None:
            self._open[within].remove(sub_run)
        if _innermost.get() is sub_run:
            _innermost.set(sub_run.outer)
        try:
            await sub_run.block.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except ContextClosedError:
            if error is None:
                raise
        except BaseException as raised:
            if raised is not error:
                raise

    async def _sweep(self, run: AgentRun) -> None:
        """End the runs of agents whose task has ended without a word: of those that handed over to another, say."""
        if not self._open:
            return
        for sub_run in tuple(self._open.get(self.outermost(run), ())):
            if sub_run.task is not None and sub_run.task.done() and self._is_open(sub_run):
                await self._leave(sub_run, asyncio.CancelledError() if sub_run.task.cancelled() else None)

    async def end(self, run: AgentRun, error: BaseException | None) -> None:
        """Whatever is left open, when the run that it was opened in ends."""
        while left := self._open.get(run):
            await self._leave(left[-1], error)

    # Models.

    async def before_model_callback(
        self, *, callback_context: CallbackContext, llm_request: LlmRequest
    ) -> LlmResponse | None:
        """A model is asked."""
        del llm_request
        if (run := self.run_here(_invocation_of(callback_context), "call of a model")) is not None:
            run.thinking()
        return None

    async def after_model_callback(
        self, *, callback_context: CallbackContext, llm_response: LlmResponse
    ) -> LlmResponse | None:
        """A model answers."""
        for part in (llm_response.content.parts if llm_response.content else None) or ():
            if part.thought and part.text:
                run = self.run_here(_invocation_of(callback_context), "answer of a model")
                if run is not None:
                    run.thinking(part.text)
        return None

    # Tools.

    async def before_tool_callback(
        self, *, tool: BaseTool, tool_args: dict[str, Any], tool_context: ToolContext
    ) -> dict[str, Any] | None:
        """A tool is called."""
        del tool_args
        if (run := self.run_here(_invocation_of(tool_context), f"tool {tool.name}")) is not None:
            call = run.tool(tool.name, tool_context.function_call_id)
            self._calls[tool_context] = call
            call.__enter__()
            watch_threads(call, tool_context)
        return None

    async def after_tool_callback(
        self, *, tool: BaseTool, tool_args: dict[str, Any], tool_context: ToolContext, result: dict[str, Any]
    ) -> dict[str, Any] | None:
        """A tool has answered."""
        del tool, tool_args, result
        self._tool_ended(tool_context, None)
        return None

    async def on_tool_error_callback(
        self, *, tool: BaseTool, tool_args: dict[str, Any], tool_context: ToolContext, error: Exception
    ) -> dict[str, Any] | None:
        """A tool has failed, or is cancelled."""
        del tool, tool_args
        self._tool_ended(tool_context, error)
        return None

    def _tool_ended(self, tool_context: ToolContext, error: BaseException | None) -> None:
        call = self._calls.pop(tool_context, None)
        if call is not None:
            call.__exit__(type(error) if error else None, error, None)


def _invocation_of(context: CallbackContext) -> InvocationContext:
    return context._invocation_context  # pyright: ignore[reportPrivateUsage] - get_invocation_context() copies


def _is_again(
    sub_run: _SubRun, agent: BaseAgent, invocation: InvocationContext, task: "asyncio.Task[Any] | None"
) -> bool:
    return (sub_run.agent, sub_run.task, sub_run.invocation.invocation_id, sub_run.invocation.branch) == (
        *(agent.name, task, invocation.invocation_id),
        invocation.branch,
    )
