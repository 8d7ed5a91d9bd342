"""GoogleADK: the plugin that runs ADK's agents by the names that they are registered under."""

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final
from uuid import uuid4

from google.adk.agents.base_agent import BaseAgent
from google.adk.agents.invocation_context import InvocationContext
from google.adk.agents.run_config import RunConfig
from google.adk.apps.app import App
from google.adk.artifacts.base_artifact_service import BaseArtifactService
from google.adk.auth.credential_service.base_credential_service import BaseCredentialService
from google.adk.events.event import Event
from google.adk.memory.base_memory_service import BaseMemoryService
from google.adk.models.base_llm import BaseLlm
from google.adk.plugins.base_plugin import BasePlugin
from google.adk.runners import Runner
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.adk.tools.base_tool import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.adk.workflow import BaseNode
from google.genai import types
from pydantic import ValidationError

from ucm_google_adk.artifacts import OwnedArtifactService
from ucm_google_adk.callbacks import UserContextPlugin
from ucm_google_adk.installed import unknown_adk
from ucm_google_adk.memory import OwnedMemoryService
from ucm_google_adk.owners import require_same_user
from ucm_google_adk.sessions import OwnedSessionService
from ucm_google_adk.toolsets import Toolsets
from ucm_middleware import AgentParametersError, AgentRun, UserContextError, hookimpl

if not hasattr(Runner, "_collect_toolset"):
    raise unknown_adk("closes toolsets")

PARAMETERS: Final = ("message", "session_id", "state_delta", "run_config", "invocation_id")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run came to. ``text`` is that of the last final response, ``session_id`` goes on with the conversation.

    ``events`` are all that ADK gave, but for the partial ones of a stream.
    """

    text: str
    session_id: str
    events: Sequence[Event] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Request:
    """The parameters of one run, checked."""

    session_id: str
    message: types.Content | None
    state_delta: dict[str, Any] | None
    run_config: RunConfig | None
    invocation_id: str | None


class GoogleADK:
    """Runs what a registered factory makes: an agent or a node of ADK, or an ``App`` with plugins and settings.

    ``app_name`` is the app in all services. They are wrapped, so that each user has ones own; without a
    ``session_service``, conversations are kept in memory. ``plugins`` of ADK come after the adapter's, in each run.
    ``run_config`` is for runs that are given none.

    Parameters of a run: ``message`` (text, or a ``Content``), ``session_id`` to go on with a conversation, or begin one
    by that name, ``state_delta``, ``run_config``, and ``invocation_id`` to resume one.

    ``execute_with_agent`` returns an ``Answer``, and a stream gives ADK's events, with the ``Answer`` as its result.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(
        self,
        app_name: str = "agents",
        *,
        session_service: BaseSessionService | None = None,
        memory_service: BaseMemoryService | None = None,
        artifact_service: BaseArtifactService | None = None,
        credential_service: BaseCredentialService | None = None,
        plugins: Sequence[BasePlugin] = (),
        run_config: RunConfig | None = None,
    ) -> None:
        self.app_name = app_name
        self.session_service = _owned_sessions(session_service)
        self.memory_service = _owned_memory(memory_service)
        self.artifact_service = _owned_artifacts(artifact_service)
        self._credential_service = credential_service
        self._plugins = tuple(plugins)
        self._run_config = run_config
        self._toolsets = Toolsets()

    @hookimpl
    def ucm_run_agent(self, run: AgentRun, agent: object, parameters: Mapping[str, Any]) -> Awaitable[object] | None:
        """Run an agent of ADK to its end."""
        if not isinstance(agent, (BaseNode, App)):
            return None
        return self._execute(run, agent, self._request(run, parameters))

    @hookimpl
    def ucm_stream_agent(
        self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
    ) -> AsyncGenerator[Event] | None:
        """Give the events of an agent of ADK."""
        if not isinstance(agent, (BaseNode, App)):
            return None
        return self._stream(run, agent, self._request(run, parameters))

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        """Agents and what they are made of, and services. Sessions and the contexts of runs are each one user's."""
        return (
            *(GoogleADK, BaseNode, App, BaseLlm, BaseTool, BaseToolset, BasePlugin, BaseCredentialService),
            *(BaseSessionService, BaseMemoryService, BaseArtifactService),
        )

    async def _execute(self, run: AgentRun, agent: BaseNode | App, request: _Request) -> Answer:
        async with aclosing(self._stream(run, agent, request)) as events:
            async for _ in events:
                pass
        answer: Answer = run.result
        return answer

    async def _stream(self, run: AgentRun, agent: BaseNode | App, request: _Request) -> AsyncGenerator[Event]:
        kept: list[Event] = []
        text = ""
        async with self._runner(run, agent) as runner:
            given = runner.run_async(
                user_id=run.context.user_id,
                session_id=request.session_id,
                invocation_id=request.invocation_id,
                new_message=request.message,
                state_delta=request.state_delta,
                run_config=request.run_config,
            )
            async with aclosing(given) as events:
                async for event in events:
                    if not event.partial:
                        kept.append(event)
                        if event.is_final_response() and (said := _text_of(event)):
                            text = said
                    yield event
        run.result = Answer(text, request.session_id, tuple(kept))

    @asynccontextmanager
    async def _runner(self, run: AgentRun, agent: BaseNode | App) -> AsyncGenerator[Runner]:
        """A runner for one run. When it is left, what the run opened is closed."""
        root = agent.root_agent if isinstance(agent, App) else agent
        ours = _RunPlugin(run, root)
        theirs = [*self._plugins, *(agent.plugins if isinstance(agent, App) else ())]
        plugins = [ours, *(each for each in theirs if not isinstance(each, UserContextPlugin))]
        if isinstance(agent, App):
            app = agent.model_copy(update={"plugins": plugins})
        else:
            # As the runner does it for an agent: any name will do.
            app = App.model_construct(name=self.app_name, root_agent=agent, plugins=plugins)
        runner = Runner(
            app=app,
            app_name=self.app_name,
            session_service=self.session_service,
            memory_service=self.memory_service,
            artifact_service=self.artifact_service,
            credential_service=self._credential_service,
            auto_create_session=True,
        )
        toolsets = runner._collect_toolset(runner.agent)  # pyright: ignore[reportPrivateUsage] - as its close() does
        async with self._toolsets.used(toolsets):
            error: BaseException | None = None
            try:
                yield runner
            except GeneratorExit:
                raise  # nobody reads on
            except RuntimeError as raised:
                error = raised
                if isinstance(raised.__cause__, UserContextError):
                    # ADK hides in it what a plugin raises.
                    raise raised.__cause__ from None
                raise
            except BaseException as raised:
                error = raised
                raise
            finally:
                await ours.end(run, error)
                await self.session_service.flush()

    def _request(self, run: AgentRun, parameters: Mapping[str, Any]) -> _Request:
        """Raises AgentParametersError."""
        name = run.agent_name
        unknown = [each for each in parameters if each not in PARAMETERS]
        if unknown:
            raise AgentParametersError(
                name, f"it takes no parameter {', '.join(map(repr, unknown))}", f"it takes {', '.join(PARAMETERS)}"
            )
        session_id = _checked(name, parameters, "session_id", str, "text")
        invocation_id = _checked(name, parameters, "invocation_id", str, "text")
        message = _message(name, parameters.get("message"))
        if message is None and invocation_id is None:
            raise AgentParametersError(
                name, "it is given no message", "give message=, text or a Content of google.genai"
            )
        return _Request(
            str(uuid4()) if session_id is None else session_id,
            message,
            _checked(name, parameters, "state_delta", dict, "a dict"),
            _checked(name, parameters, "run_config", RunConfig, "a RunConfig") or self._run_config,
            invocation_id,
        )


class _RunPlugin(UserContextPlugin):
    """The plugin of one run, whose own agent is no sub-agent of it."""

    def __init__(self, run: AgentRun, root: BaseNode | None) -> None:
        super().__init__()
        self._run = run
        self._root = root
        self._invocation: str | None = None

    def is_run_itself(self, agent: BaseAgent, invocation: InvocationContext) -> bool:
        """The first invocation is the run's; an agent as a tool brings another."""
        return (
            self._root is not None
            and invocation.invocation_id == self._invocation
            and agent.name == self._root.name
            and agent.parent_agent is None
        )

    def run_here(self, invocation: InvocationContext, action: str) -> AgentRun:
        """The run that the plugin was made for, or the sub-run that this code is in."""
        run = self.innermost() or self._run
        run.require_here()
        require_same_user(run.context, invocation.session.user_id, action)
        return run

    def outermost(self, run: AgentRun) -> AgentRun:
        """The one that the plugin was made for."""
        return self._run

    async def before_run_callback(self, *, invocation_context: InvocationContext) -> types.Content | None:
        if self._invocation is None:
            self._invocation = invocation_context.invocation_id
        return await super().before_run_callback(invocation_context=invocation_context)


def _owned_sessions(service: BaseSessionService | None) -> OwnedSessionService:
    if isinstance(service, OwnedSessionService):
        return service
    return OwnedSessionService(InMemorySessionService() if service is None else service)


def _owned_memory(service: BaseMemoryService | None) -> OwnedMemoryService | None:
    return service if service is None or isinstance(service, OwnedMemoryService) else OwnedMemoryService(service)


def _owned_artifacts(service: BaseArtifactService | None) -> OwnedArtifactService | None:
    return service if service is None or isinstance(service, OwnedArtifactService) else OwnedArtifactService(service)


def _message(agent: str, given: Any) -> types.Content | None:
    found = "no text" if isinstance(given, str) else f"a {type(given).__name__}"
    if given is None or isinstance(given, types.Content):
        return given
    if isinstance(given, str) and given.strip():
        return types.Content(role="user", parts=[types.Part(text=given)])
    if isinstance(given, dict):
        try:
            return types.Content.model_validate(given)
        except ValidationError:
            pass  # its text repeats what was given
    raise AgentParametersError(agent, f"its message is {found}", "give text, or a Content of google.genai")


def _checked(agent: str, parameters: Mapping[str, Any], name: str, kind: type[Any], said: str) -> Any:
    given = parameters.get(name)
    if given is None or isinstance(given, kind):
        return given
    raise AgentParametersError(agent, f"its {name} is a {type(given).__name__}", f"give {said}")


def _text_of(event: Event) -> str:
    parts = (event.content.parts if event.content else None) or []
    return "".join(part.text for part in parts if part.text and not part.thought)
