"""LangGraph: the plugin, which runs compiled graphs, and agents of LangChain, which are compiled graphs too."""

# LangGraph tells the types of its graphs to nobody.
# pyright: reportMissingTypeStubs=false

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection, Mapping
from typing import Any, ClassVar, Final

from langchain_core.runnables import Runnable
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore

from ucm_langgraph.cache import OwnedCache
from ucm_langgraph.checkpoints import OwnedCheckpointer
from ucm_langgraph.handlers import RunHandler, StreamHandler
from ucm_langgraph.parameters import Given, checked
from ucm_langgraph.steps import prepared, subgraphs_of
from ucm_langgraph.store import OwnedStore
from ucm_middleware import AgentError, AgentRun, hookimpl

Graph = Any

_KEPT: Final[tuple[tuple[str, type, type], ...]] = (
    ("checkpointer", BaseCheckpointSaver, OwnedCheckpointer),
    ("store", BaseStore, OwnedStore),
    ("cache", BaseCache, OwnedCache),
)


class LangGraph:
    """Runs compiled graphs, and agents that LangChain's ``create_agent`` makes, as one user each.

    ``UserContextManager(plugins=[LangGraph()])``, ``manager.register_agent("trips", lambda context: graph,
    stateless=True)``, ``await manager.execute_with_agent(user_id, "trips", {"input": {...}, "thread_id": "rome"})``.
    A compiled graph keeps nothing of a run, so that one may serve all of them.

    A graph whose checkpointer, store or cache is not owned is refused with AgentError, unless it is one of ``shared``:
    what all users are to read and write, such as a store that the application fills with what everybody may know.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(self, *, shared: Collection[object] = ()) -> None:
        self._shared = tuple(shared)

    @hookimpl
    def ucm_run_agent(self, run: AgentRun, agent: object, parameters: Mapping[str, Any]) -> Awaitable[object] | None:
        if not isinstance(agent, Pregel):
            return None
        graph, given = self._prepared(run, agent, parameters, streams=False)
        _add_handler(given, RunHandler(run))
        return _invoke(graph, given)

    @hookimpl
    def ucm_stream_agent(
        self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
    ) -> AsyncIterator[object] | None:
        if not isinstance(agent, Pregel):
            return None
        graph, given = self._prepared(run, agent, parameters, streams=True)
        _add_handler(given, StreamHandler(run))
        return _stream(graph, given)

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (LangGraph, Runnable, BaseCheckpointSaver, BaseStore, BaseCache)

    def _prepared(
        self, run: AgentRun, agent: Graph, parameters: Mapping[str, Any], *, streams: bool
    ) -> tuple[Graph, Given]:
        self._require_owned(run, agent)
        return prepared(agent), checked(run, agent, parameters, streams=streams)

    def _require_owned(self, run: AgentRun, agent: Graph) -> None:
        for what, bare, owned in _KEPT:
            self._require(run, f"its {what}", getattr(agent, what), bare, owned)
        # Of what a subgraph was compiled with, LangGraph uses this alone: the checkpointer and the store are the run's.
        for name, graph in subgraphs_of(agent).items():
            self._require(run, f"the cache of its subgraph {name!r}", graph.cache, BaseCache, OwnedCache)

    def _require(self, run: AgentRun, what: str, kept: object, bare: type, owned: type) -> None:
        if isinstance(kept, bare) and not isinstance(kept, owned) and not any(kept is one for one in self._shared):
            raise AgentError(
                run.agent_name,
                f"{what} is all users' together: a {type(kept).__name__}",
                f"compile it with {owned.__name__}(...) around that",
            )


def _add_handler(given: Given, handler: RunHandler) -> None:
    given.config["callbacks"] = [handler]


async def _invoke(graph: Graph, given: Given) -> object:
    var_child_runnable_config.set(None)  # of a run around this one; the task is this run's own
    return await graph.ainvoke(given.input, given.config, **given.options)


async def _stream(graph: Graph, given: Given) -> AsyncGenerator[object]:
    var_child_runnable_config.set(None)
    stream: Any = (
        graph.astream_events(given.input, given.config, version="v2", **given.options)
        if given.events
        else graph.astream(given.input, given.config, **given.options)
    )
    try:
        async for item in stream:
            yield item
    finally:
        await stream.aclose()
