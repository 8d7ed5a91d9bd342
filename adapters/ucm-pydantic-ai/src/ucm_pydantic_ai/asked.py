"""What a run is asked for: by whoever registered the agent, and by whoever runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from pydantic_ai import UsageLimits
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import ModelRequest, ModelResponse
from pydantic_ai.tools import DeferredToolResults

from ucm_middleware import AgentError, AgentParametersError, AgentRun, ConfigurationError

_OPTIONS: Final = frozenset(
    {"capabilities", "cancellation_token", "instructions", "metadata", "model", "model_settings", "output_type"}
    | {"retries", "spec", "toolsets", "usage", "usage_limits", "workspace"}
)
"""What an application may settle for each run of an agent: the arguments of ``Agent.run``, apart from those below."""

_UNSET: Final = object()


class Prepared:
    """What a factory may return instead of an agent: the agent, and what its run is to have.

    ``deps`` are the run's own context unless others are given here. ``options`` are arguments of ``Agent.run`` that the
    application settles: ``model``, ``instructions``, ``usage_limits``, ``toolsets``, and so on.

    Raises ConfigurationError for what is no agent, and for an option that there is not.
    """

    __slots__ = ("__weakref__", "agent", "deps", "options")

    def __init__(self, agent: AbstractAgent[Any, Any], *, deps: object = _UNSET, **options: Any) -> None:
        if not isinstance(cast("object", agent), AbstractAgent):
            raise ConfigurationError(f"agent is a {type(agent).__name__}, and no agent of Pydantic AI's; give one")
        if unknown := options.keys() - _OPTIONS:
            raise ConfigurationError(
                f"{', '.join(sorted(unknown))} cannot be settled for a run; what can be: {', '.join(sorted(_OPTIONS))}"
            )
        self.agent = agent
        self.deps = deps
        self.options = options

    @property
    def __ucm_agent__(self) -> object:
        """What is to be another one for each run."""
        return self.agent

    def deps_for(self, run: AgentRun) -> object:
        """Raises AgentError where the agent wants other deps than a context, and there are none."""
        if self.deps is not _UNSET:
            return self.deps
        wanted = cast("object", self.agent.deps_type)  # which may be written as any type can
        if not isinstance(wanted, type) or wanted is type(None) or isinstance(run.context, wanted):
            return run.context
        raise AgentError(
            run.agent_name,
            f"wants deps of the type {wanted.__name__}, and the run has its UserExecutionContext",
            "let its factory return Prepared(agent, deps=...), or make the agent with deps_type=UserExecutionContext",
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """The parameters of one run, checked."""

    prompt: Any
    conversation_id: str | None
    options: dict[str, Any]


def checked_parameters(run: AgentRun, given: Mapping[str, Any]) -> Asked:
    """Raises AgentParametersError for what does not fit."""
    for name in given:
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise AgentParametersError(run.agent_name, f"there is no parameter {name!r:.100}", f"it takes {known}")
    for name, value in given.items():
        what, fits = _PARAMETERS[name]
        if value is not None and not fits(value):
            raise AgentParametersError(run.agent_name, f"{name} is a {type(value).__name__}", f"give {what}")
    values = {name: value for name, value in given.items() if value is not None}
    prompt, conversation_id = values.pop("prompt", None), values.pop("conversation_id", None)
    if prompt is None and not values.keys() & {"deferred_tool_results", "message_history"}:
        raise AgentParametersError(run.agent_name, "there is no prompt", "give what the user says as 'prompt'")
    if conversation_id is not None and "message_history" in values:
        raise AgentParametersError(
            run.agent_name,
            "both conversation_id and message_history are given",
            "give the conversation_id alone: its messages are those that are kept",
        )
    return Asked(prompt, conversation_id, values)


def _is_prompt(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)


def _is_history(value: object) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(message, ModelRequest | ModelResponse) for message in cast("Sequence[object]", value)
    )


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


_PARAMETERS: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "prompt": ("text, or a list of the framework's user content", _is_prompt),
    "conversation_id": ("text, which the client may choose", _is(str)),
    "message_history": ("a list of the framework's messages", _is_history),
    "deferred_tool_results": ("the framework's DeferredToolResults", _is(DeferredToolResults)),
    "usage_limits": ("the framework's UsageLimits", _is(UsageLimits)),
    "model_settings": ("a dict, as the framework's ModelSettings", _is(dict)),
    "metadata": ("a dict", _is(dict)),
}
