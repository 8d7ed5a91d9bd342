"""What happens in a run of Pydantic AI's, step by step: told, and done as the user whose run it is."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import pydantic_ai._utils
from pydantic_ai import Agent, RunContext
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability, AgentNode, CombinedCapability, WrapperCapability
from pydantic_ai.capabilities.abstract import (
    CapabilityOrdering,
    RawOutput,
    ValidatedToolArgs,
    WrapOutputProcessHandler,
    WrapOutputValidateHandler,
    WrapRunHandler,
    WrapToolExecuteHandler,
)
from pydantic_ai.exceptions import ApprovalRequired, CallDeferred, SkipToolExecution
from pydantic_ai.messages import AgentStreamEvent, ModelResponse, ThinkingPart, ToolCallPart
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.output import OutputContext
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import ToolDefinition

from ucm_middleware import (
    AgentRun,
    ContextClosedError,
    CrossUserAccessError,
    UserExecutionContext,
    agent_run,
    current_context,
)
from ucm_pydantic_ai.threads import ToolThreads, watching

_NAME: Final = "agent"
"""What a run is called whose agent has no name."""


@dataclass
class UserRuns(AbstractCapability[Any]):
    """A capability for agents that the application runs itself: ``Agent(..., capabilities=[UserRuns()])``, or for one
    run, ``agent.run(..., capabilities=[UserRuns()])``. So for sub-agents, which the tools of others run.

    Each run is then a run of the user that the code runs for, in a child context of its own: told, on record, and
    refused where there is no user. Its steps are refused with CrossUserAccessError, recorded, in any other user's
    context than the one that it was started in, whoever iterates: prompts and instructions, model requests, tools,
    output functions and validators, and the reading of what its model streams. So is the start in another user's
    context than the one that is given as ``deps``.

    Agents that a manager runs by name need none. ``executor`` is for their synchronous tools, where the application has
    chosen none in the framework's own ways; by default they have up to 256 threads.
    """

    executor: Executor = field(default_factory=ToolThreads, repr=False, compare=False)

    _: KW_ONLY

    run: AgentRun | None = field(default=None, repr=False, compare=False)
    """The run that has begun already, by whoever gives this."""

    id: str | None = "ucm_user_runs"

    @classmethod
    def get_serialization_name(cls) -> str | None:
        return None

    def get_ordering(self) -> CapabilityOrdering:
        return CapabilityOrdering(position="outermost")

    async def for_run(self, ctx: RunContext[Any]) -> AbstractCapability[Any]:
        return self if self.run is not None else copy(self)

    async def wrap_run(self, ctx: RunContext[Any], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        _running.set(None)  # the hooks below are for the run around this one, and these for this one
        if self.run is not None:
            return await handler()
        name = None if ctx.agent is None else ctx.agent.name
        try:
            async with agent_run(_whose(ctx.deps), name or _NAME) as self.run:
                return await handler()
        except ContextClosedError as error:
            # The framework waits here, and runs the agent in another task, which is refused by whatever it asks for
            # next. A cancellation is what it expects of a task that is cut off.
            if isinstance(error.__cause__, asyncio.CancelledError):
                raise error.__cause__ from None
            raise

    async def before_model_request(
        self, ctx: RunContext[Any], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        self._begun().thinking()
        return request_context

    async def after_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, response: ModelResponse
    ) -> ModelResponse:
        _tell_thoughts(self._begun(), response)
        return response

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Any],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: ValidatedToolArgs,
        handler: WrapToolExecuteHandler,
    ) -> Any:
        return await _call(self._begun(), self.executor, call, args, handler)

    # What follows looks at who goes on with the run. Each is the first that the framework asks, on one way to it.

    async def before_node_run(self, ctx: RunContext[Any], *, node: "AgentNode[Any]") -> "AgentNode[Any]":
        """Of each step, by ``iter()`` and ``run_stream()``: before its prompts are made."""
        self._require_here()
        return node

    async def prepare_tools(self, ctx: RunContext[Any], tool_defs: list[ToolDefinition]) -> list[ToolDefinition]:
        """Of a model request that is streamed by hand, ``node.stream(run.ctx)``: before its instructions are made."""
        self._require_here()
        return tool_defs

    async def wrap_run_event_stream(
        self, ctx: RunContext[Any], *, stream: AsyncIterable[AgentStreamEvent]
    ) -> AsyncGenerator[AgentStreamEvent]:
        """Of each event that is read: the code behind it, a model's or that of tools, runs as whoever reads."""
        self._require_reader()
        async for event in stream:
            yield event
            self._require_reader()

    @property
    def has_wrap_run_event_stream(self) -> bool:
        return False  # what nobody reads need not be streamed for this

    async def wrap_output_validate(
        self,
        ctx: RunContext[Any],
        *,
        output_context: OutputContext,
        output: RawOutput,
        handler: WrapOutputValidateHandler,
    ) -> Any:
        """Of an output that is asked for at the end of a stream: before it is parsed, if it is."""
        self._require_here()
        return await handler(output)

    async def wrap_output_process(
        self, ctx: RunContext[Any], *, output_context: OutputContext, output: Any, handler: WrapOutputProcessHandler
    ) -> Any:
        """The same, before output functions and validators."""
        self._require_here()
        return await handler(output)

    def _require_here(self) -> None:
        if self.run is not None:  # tools are listed outside of runs, too
            self.run.require_here()
            self.run.require_going_on()

    def _require_reader(self) -> None:
        try:
            self._require_here()
        except CrossUserAccessError as error:
            # The framework takes a stream that has raised for one that is over: what came so far is not the answer.
            self._begun().end(error)
            raise

    def _begun(self) -> AgentRun:
        assert self.run is not None  # wrap_run comes first
        return self.run


@dataclass
class _Steps(WrapperCapability[Any]):
    """The same hooks for what a manager runs, around a capability that the agent has anyway.

    The framework copies its RunContext for each capability at each of its hooks, and composes anew what is given for
    one run. That costs more than these hooks themselves, so they are in the place of another, once for each agent.
    """

    executor: Executor = field(default_factory=ToolThreads, repr=False, compare=False)

    def get_ordering(self) -> CapabilityOrdering | None:
        return self.wrapped.get_ordering()

    async def before_model_request(
        self, ctx: RunContext[Any], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        if (run := _running.get()) is not None:
            run.thinking()
        return await self.wrapped.before_model_request(ctx, request_context)

    async def after_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, response: ModelResponse
    ) -> ModelResponse:
        response = await self.wrapped.after_model_request(ctx, request_context=request_context, response=response)
        if (run := _running.get()) is not None:
            _tell_thoughts(run, response)
        return response

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Any],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: ValidatedToolArgs,
        handler: WrapToolExecuteHandler,
    ) -> Any:
        run = _running.get()
        return await (handler(args) if run is None else _call(run, self.executor, call, args, handler))


_running: ContextVar[AgentRun | None] = ContextVar("ucm_pydantic_ai_running")
"""The run whose steps ``_Steps`` tells; None where UserRuns does, so that nothing is told twice."""

_CARRIER: Final = "PendingMessageDrainCapability"
"""What every agent has, outermost, and nobody looks for."""


@contextmanager
def hooked(agent: AbstractAgent[Any, Any], run: AgentRun, executor: Executor) -> Generator[list[UserRuns]]:
    """In the block, a run of ``agent`` is this run. Gives the capabilities that are to be given to it."""
    root = _root_of(agent, executor)
    override: ContextVar[Any] | None = getattr(agent, "_override_root_capability", None)
    if root is None or override is None or override.get() is not None:
        yield [UserRuns(executor, run=run)]  # the public way
        return
    running = _running.set(run)
    token = override.set(pydantic_ai._utils.Some(root))
    try:
        yield []
    finally:
        override.reset(token)
        _running.reset(running)


def _root_of(agent: AbstractAgent[Any, Any], executor: Executor) -> CombinedCapability[Any] | None:
    """The agent's capabilities with ours among them; kept with the agent, which they may refer to."""
    if type(agent) is not Agent:
        return None
    root = agent.root_capability
    kept: tuple[object, object, CombinedCapability[Any] | None] | None = vars(agent).get("_ucm_root")
    if kept is not None and kept[0] is root and kept[1] is executor:
        return kept[2]
    found = _with_steps(root, executor)
    vars(agent)["_ucm_root"] = (root, executor, found)
    return found


def _with_steps(root: CombinedCapability[Any], executor: Executor) -> CombinedCapability[Any] | None:
    leaves: list[AbstractCapability[Any]] = []
    root.apply(leaves.append)
    carriers = [leaf for leaf in leaves if type(leaf).__name__ == _CARRIER]
    if len(carriers) != 1 or any(isinstance(leaf, UserRuns) for leaf in leaves):
        return None
    replaced = root.visit_and_replace(lambda leaf: _Steps(leaf, executor=executor) if leaf is carriers[0] else leaf)
    return replaced if isinstance(replaced, CombinedCapability) else None


async def _call(
    run: AgentRun, executor: Executor, call: ToolCallPart, args: ValidatedToolArgs, handler: WrapToolExecuteHandler
) -> Any:
    with run.tool(call.tool_name, call.tool_call_id) as tool, watching(tool, executor):
        try:
            return await handler(args)
        except (ApprovalRequired, CallDeferred, SkipToolExecution):
            tool.end()  # nothing failed: it is somebody else's turn
            raise


def _tell_thoughts(run: AgentRun, response: ModelResponse) -> None:
    for part in response.parts:
        if isinstance(part, ThinkingPart) and part.content:
            run.thinking(part.content)


def _whose(deps: object) -> UserExecutionContext:
    """The context that a run is started in: the one around it, and the one given where that is another user's, which
    is refused there."""
    context = current_context()
    if isinstance(deps, UserExecutionContext) and deps.user_id != context.user_id:
        return deps
    return context
