"""OpenAIAgents: the plugin, which runs agents of the SDK in the context of the run."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from agents import (
    Agent,
    AgentBase,
    FunctionTool,
    Handoff,
    Model,
    ModelProvider,
    RunConfig,
    RunHooks,
    Runner,
    RunResult,
    RunResultStreaming,
    UserError,
)
from agents.memory import Session
from agents.tracing.scope import Scope

from ucm_middleware import AgentRun, UserContextError, hookimpl
from ucm_openai_agents.flow import Flow, enter_flow
from ucm_openai_agents.parameters import RunParameters, checked_parameters
from ucm_openai_agents.sessions import AnySession, OwnedSessions, sessions_of
from ucm_openai_agents.watch import guard_agent, is_agent, within


class OpenAIAgents:
    """Runs an ``agents.Agent`` by ``Runner``, with the run's context as the SDK's.

    ``sessions`` opens what the parameter ``session_id`` names: OwnedSessions, or a function from a key to a session of
    the SDK. ``run_config`` and ``hooks`` are for all runs.

    The SDK's own tracing is off for these runs, whatever is on in the process. With ``tracing`` each has a trace of its
    own, whatever trace the code around is in, and without what was said. A ``run_config`` decides that for itself, by
    ``trace_include_sensitive_data``, which the SDK sets where it is not given.

    Raises ConfigurationError for sessions that are none.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(
        self,
        *,
        sessions: OwnedSessions[Any] | Callable[[str], AnySession] | None = None,
        run_config: RunConfig | None = None,
        hooks: RunHooks[Any] | None = None,
        tracing: bool = False,
    ) -> None:
        self._sessions = sessions_of(sessions)
        self._hooks = hooks
        self._tracing = tracing
        # As a dict, the SDK makes a provider of models for each run, and closes it. What is given is the application's.
        self._config: RunConfig | dict[str, Any]
        if run_config is None:
            self._config = {"trace_include_sensitive_data": False, "tracing_disabled": not tracing}
        else:
            self._config = replace(run_config, tracing_disabled=not tracing)

    @hookimpl
    def ucm_run_agent(self, run: AgentRun, agent: object, parameters: Mapping[str, Any]) -> Awaitable[RunResult] | None:
        if not is_agent(agent):
            return None
        return self._run(run, agent, self._checked(run, parameters))

    @hookimpl
    def ucm_stream_agent(
        self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
    ) -> AsyncGenerator[object] | None:
        if not is_agent(agent):
            return None
        return self._stream(run, agent, self._checked(run, parameters))

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (OpenAIAgents, AgentBase, FunctionTool, Handoff, Model, ModelProvider, RunConfig)

    def _checked(self, run: AgentRun, parameters: Mapping[str, Any]) -> RunParameters:
        return checked_parameters(run.agent_name, parameters, has_sessions=self._sessions is not None)

    async def _run(self, run: AgentRun, agent: Agent[Any], asked: RunParameters) -> RunResult:
        flow = enter_flow(Flow(run))
        session = await self._session(run, asked)
        return await within(flow, _told_why(Runner.run(guard_agent(agent), **self._arguments(run, asked, session))))

    async def _stream(self, run: AgentRun, agent: Agent[Any], asked: RunParameters) -> AsyncGenerator[object]:
        flow = enter_flow(Flow(run))
        session = await self._session(run, asked)
        result = Runner.run_streamed(guard_agent(agent), **self._arguments(run, asked, session))
        events = result.stream_events()
        try:
            async for event in events:
                yield event
        except BaseException as error:  # noqa: BLE001 - it is raised
            await _stop(result, events)
            # Where nobody reads on, that is what it is told.
            await flow.end(asyncio.CancelledError() if isinstance(error, GeneratorExit) else error)
            raise _reason(error) from None
        await flow.end(None)
        run.result = result

    async def _session(self, run: AgentRun, asked: RunParameters) -> Session | None:
        if self._tracing:
            # This task's Context is the run's alone: what trace the code that started it was in is of no more concern.
            Scope.set_current_trace(None)
            Scope.set_current_span(None)
        if asked.session_id is None or self._sessions is None:
            return None
        session: Session = await self._sessions.open(asked.session_id, run.context)
        return session

    def _config_of(self, session: Session | None) -> RunConfig | dict[str, Any]:
        """The run's own group of traces: that of its conversation, by the key, and none that all runs would share."""
        if not self._tracing:
            return self._config
        group = None if session is None else session.session_id
        if isinstance(self._config, RunConfig):
            return replace(self._config, group_id=group)
        return {**self._config, "group_id": group}

    def _arguments(self, run: AgentRun, asked: RunParameters, session: Session | None) -> dict[str, Any]:
        return {
            "input": asked.input,
            "context": run.context,
            "max_turns": asked.max_turns,
            "hooks": self._hooks,
            "run_config": self._config_of(session),
            "session": session,
        }


async def _stop(result: RunResultStreaming, events: AsyncIterator[object]) -> None:
    """End the SDK's loop, which runs in a task of its own and would go on, whoever reads or does not."""
    result.cancel()
    if result.run_loop_task is not None:
        await asyncio.wait((result.run_loop_task,))
    if isinstance(events, AsyncGenerator):
        await events.aclose()


async def _told_why(work: Awaitable[RunResult]) -> RunResult:
    try:
        return await work
    except UserError as error:
        raise _reason(error) from None


def _reason(error: BaseException) -> BaseException:
    """A refusal of ours as it is, out of the error that the SDK makes of it."""
    cause = error.__cause__
    return cause if isinstance(error, UserError) and isinstance(cause, UserContextError) else error
