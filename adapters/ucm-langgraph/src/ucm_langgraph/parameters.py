"""What a run is given, checked, as LangGraph takes it."""

# LangGraph tells the types of its graphs to nobody.
# pyright: reportMissingTypeStubs=false

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command
from typing_extensions import is_typeddict

from ucm_middleware import AgentParametersError, AgentRun, UserExecutionContext

_CONFIG: Final = ("recursion_limit", "max_concurrency", "tags", "metadata")
_OPTIONS: Final = ("durability", "interrupt_before", "interrupt_after", "output_keys", "version")
_KNOWN: Final = ("input", "resume", "thread_id", "checkpoint_id", "context", "configurable", *_CONFIG, *_OPTIONS)
_OF_STREAMS: Final = ("stream_mode", "subgraphs", "events")
_ADDRESSES: Final = ("thread_id", "checkpoint_id", "checkpoint_ns", "checkpoint_map")


@dataclass(frozen=True, slots=True)
class Given:
    """What LangGraph is given."""

    input: Any
    config: RunnableConfig
    options: dict[str, Any]
    events: bool


def checked(run: AgentRun, graph: Any, parameters: Mapping[str, Any], *, streams: bool = False) -> Given:
    """Raises AgentParametersError for what does not fit."""
    known = (*_KNOWN, *_OF_STREAMS) if streams else _KNOWN
    if unknown := [name for name in parameters if name not in known]:
        raise AgentParametersError(
            run.agent_name, f"it takes no parameter {unknown[0]!r}", f"it takes {', '.join(known)}"
        )
    config: dict[str, Any] = {name: parameters[name] for name in _CONFIG if name in parameters}
    given = _input(run, graph, parameters)
    config["configurable"] = _configurable(run, graph, parameters)
    config["run_name"] = run.agent_name
    options = {name: parameters[name] for name in (*_OPTIONS, "stream_mode", "subgraphs") if name in parameters}
    if "context" in parameters:
        options["context"] = parameters["context"]
    elif graph.context_schema is UserExecutionContext:
        options["context"] = run.context
    events = parameters.get("events", False)
    if not isinstance(events, bool):
        raise AgentParametersError(run.agent_name, "events is no bool", "give True for astream_events, or leave it out")
    if events and "version" in options:
        raise AgentParametersError(
            run.agent_name, "version is given with events", "leave it out: events are those of LangChain's version 2"
        )
    return Given(given, RunnableConfig(**config), options, events)  # type: ignore[typeddict-item]


def _input(run: AgentRun, graph: Any, parameters: Mapping[str, Any]) -> Any:
    if ("input" in parameters) == ("resume" in parameters):
        raise AgentParametersError(
            run.agent_name,
            "it takes either an input or a resume, and was given " + ("both" if "input" in parameters else "neither"),
            'give {"input": ...}, None to go on where it stopped, or {"resume": ...} to answer what it asked',
        )
    if "resume" in parameters:
        return Command(resume=parameters["resume"])
    given: Any = parameters["input"]
    kind = cast("type[object]", type(given))
    is_of_states = isinstance(graph, CompiledStateGraph)
    if is_of_states and issubclass(kind, (str, bytes, int, float, list, tuple)):
        schema = cast("Any", graph).builder.input_schema
        if is_typeddict(schema):
            raise AgentParametersError(
                run.agent_name,
                f"its input is a {kind.__name__}",
                f"give a mapping with {', '.join(map(repr, schema.__annotations__))}",
            )
    return given


def _configurable(run: AgentRun, graph: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    configurable = parameters.get("configurable")
    if configurable is not None and not isinstance(configurable, Mapping):
        raise AgentParametersError(run.agent_name, "configurable is no mapping", "give a mapping of names to values")
    addressed: dict[Any, Any] = {**(configurable or {})}
    for name in addressed:
        if not isinstance(name, str) or name in _ADDRESSES or name.startswith("__"):
            raise AgentParametersError(
                run.agent_name,
                f"configurable has {name!r}, which is LangGraph's",
                "name the thread and the checkpoint with the parameters thread_id and checkpoint_id",
            )
    thread_id = parameters.get("thread_id")
    if thread_id is not None:
        addressed["thread_id"] = thread_id
    elif graph.checkpointer:
        raise AgentParametersError(
            run.agent_name,
            "it keeps its state in threads, and no thread_id was given",
            'name the conversation: {"thread_id": "..."}',
        )
    if parameters.get("checkpoint_id") is not None:
        addressed["checkpoint_id"] = parameters["checkpoint_id"]
    return addressed
