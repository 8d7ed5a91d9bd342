"""PydanticAI: the plugin, which runs agents of Pydantic AI's for a manager."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar, Final, cast
from weakref import WeakValueDictionary

from pydantic_ai import UsageLimits
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationStore
from pydantic_ai.models import Model
from pydantic_ai.run import AgentRunResult, AgentRunResultEvent
from pydantic_ai.tools import Tool
from pydantic_ai.toolsets import AbstractToolset

from ucm_middleware import AgentParametersError, AgentRun, hookimpl
from ucm_pydantic_ai.asked import Asked, Prepared, checked_parameters
from ucm_pydantic_ai.conversations import KIND, UserConversations
from ucm_pydantic_ai.steps import hooked
from ucm_pydantic_ai.threads import ToolThreads


class PydanticAI:
    """``UserContextManager(plugins=[PydanticAI()])`` runs agents that are registered by name.

    A run takes ``prompt``, and perhaps ``conversation_id``, ``message_history``, ``deferred_tool_results``,
    ``usage_limits``, ``model_settings`` and ``metadata``. It comes to the framework's ``AgentRunResult``; a stream
    gives what ``run_stream_events`` gives.

    ``conversations`` is a store of the framework's for what has a ``conversation_id``; ``plugin.conversations`` is what
    the running user has in it. ``executor`` is for synchronous tools, where the application has chosen none in the
    framework's own ways; by default they have up to 256 threads.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    conversations: UserConversations | None

    def __init__(self, *, conversations: ConversationStore | None = None, executor: Executor | None = None) -> None:
        if conversations is not None and not isinstance(conversations, UserConversations):
            conversations = UserConversations(conversations)
        self.conversations = conversations
        self._executor = ToolThreads() if executor is None else executor
        self._turns = _Turns()

    @hookimpl
    def ucm_run_agent(
        self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
    ) -> Awaitable[AgentRunResult[Any]] | None:
        prepared = _prepared(agent)
        return None if prepared is None else self._run(run, prepared, checked_parameters(run, parameters))

    @hookimpl
    def ucm_stream_agent(
        self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
    ) -> AsyncIterator[object] | None:
        prepared = _prepared(agent)
        return None if prepared is None else self._stream(run, prepared, checked_parameters(run, parameters))

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (PydanticAI, AbstractAgent, AbstractToolset, Tool, Model, ConversationStore, UserConversations)

    async def _run(self, run: AgentRun, prepared: Prepared, asked: Asked) -> AgentRunResult[Any]:
        async with self._conversation(run, asked) as conversation:
            with hooked(prepared.agent, run, self._executor) as capabilities:
                result = await prepared.agent.run(**_arguments(run, prepared, asked, conversation, capabilities))
            await self._keep(conversation, result)
            return result

    async def _stream(self, run: AgentRun, prepared: Prepared, asked: Asked) -> AsyncGenerator[object]:
        async with self._conversation(run, asked) as conversation:
            with hooked(prepared.agent, run, self._executor) as capabilities:
                arguments = _arguments(run, prepared, asked, conversation, capabilities)
                async with prepared.agent.run_stream_events(**arguments) as events:
                    async for event in events:
                        if isinstance(event, AgentRunResultEvent):
                            run.result = event.result
                            await self._keep(conversation, event.result)  # before the reader may go away
                        yield event

    @asynccontextmanager
    async def _conversation(self, run: AgentRun, asked: Asked) -> AsyncGenerator[Conversation | None]:
        """The conversation that is asked for, for this run alone."""
        conversation_id = asked.conversation_id
        if conversation_id is None:
            yield None
            return
        if self.conversations is None:
            raise AgentParametersError(
                run.agent_name,
                "conversation_id is given, and conversations are kept nowhere",
                "give the plugin a store, such as PydanticAI(conversations=SQLiteConversationStore(path))",
            )
        async with self._turns.of(run, run.context.derive_key(KIND, conversation_id)):
            conversation = await self.conversations.load(conversation_id)
            yield Conversation(conversation_id=conversation_id) if conversation is None else conversation

    async def _keep(self, conversation: Conversation | None, result: AgentRunResult[Any]) -> None:
        if conversation is not None and self.conversations is not None:
            await self.conversations.save(result)


class _Turns:
    """Lets the runs of one conversation in this process be one after another: each goes on from the one before. What
    another process saves meanwhile is seen by the store, as a ConversationConflict."""

    def __init__(self) -> None:
        # A lock belongs to its event loop.
        self._locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, run: AgentRun, key: str) -> AsyncGenerator[None]:
        held = _held.get()
        if key in held:
            raise AgentParametersError(
                run.agent_name,
                "the conversation is that of a run around this one, which goes on with it at its own end",
                "give a sub-agent another conversation_id, or none",
            )
        lock = self._locks.setdefault((id(asyncio.get_running_loop()), key), asyncio.Lock())
        async with lock:
            token = _held.set(held | {key})
            try:
                yield
            finally:
                _held.reset(token)


_held: Final[ContextVar[frozenset[str]]] = ContextVar("ucm_pydantic_ai_held", default=frozenset())


def _prepared(agent: object) -> Prepared | None:
    if isinstance(agent, Prepared):
        return agent
    return Prepared(cast("Any", agent)) if isinstance(agent, AbstractAgent) else None


def _limits_after(conversation: Conversation) -> UsageLimits:
    """The framework's default, for this run: it counts the requests of the whole conversation, which would end at the
    fiftieth.
    """
    default = UsageLimits()
    if default.request_limit is None:
        return default
    return replace(default, request_limit=default.request_limit + conversation.usage.requests)


def _arguments(
    run: AgentRun, prepared: Prepared, asked: Asked, conversation: Conversation | None, capabilities: list[Any]
) -> dict[str, Any]:
    """What ``Agent.run`` is called with: what the application settled goes before what was asked for."""
    arguments: dict[str, Any] = {**asked.options, **prepared.options}
    arguments["user_prompt"] = asked.prompt
    arguments["deps"] = prepared.deps_for(run)
    arguments["infer_name"] = False  # the variable of ours that it stands in tells nothing
    if conversation is not None:
        arguments["conversation"] = conversation
        if arguments.get("usage_limits") is None:
            arguments["usage_limits"] = _limits_after(conversation)
    if capabilities:
        arguments["capabilities"] = [*arguments.get("capabilities", ()), *capabilities]
    return arguments
