"""A graph as a run uses it: the same, but that its threads are known to be running, and its subgraphs are sub-runs.

LangGraph runs steps and tools that block in threads, which nothing can stop. The graph's own nodes stay as they are.
"""

# LangGraph tells the types of its graphs to nobody, and has no other way to its tools.
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false

import copy
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Final

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, run_in_executor
from langchain_core.tools import BaseTool, StructuredTool, Tool
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from ucm_middleware import ContextNotFoundError, agent_run, current_context, current_run

Graph = Any
Nodes = dict[str, Any]

_IN_EXECUTOR: Final = run_in_executor


class _Nodes(dict[str, Any]):
    """A graph's nodes, and what is made of them, once. It is kept here, since what a node calls may well refer to the
    graph, which then would never go away if a table of ours referred to the nodes.
    """

    __slots__ = ("inside", "prepared")

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(nodes)
        self.prepared: Nodes = {name: _node(name, node) for name, node in nodes.items()}
        self.inside: dict[str, Graph] = {}
        _collect(nodes, self.inside)


def prepared(graph: Graph) -> Graph:
    """The graph for a run. What the application sets on its own, such as a checkpointer, is on this one too."""
    made = copy.copy(graph)
    made.nodes = _nodes_of(graph).prepared
    return made


def subgraphs_of(graph: Graph) -> Mapping[str, Graph]:
    """The graphs that LangGraph finds in a graph's nodes, and in theirs, by the names of those."""
    return _nodes_of(graph).inside


def _nodes_of(graph: Graph) -> _Nodes:
    nodes = graph.nodes
    if not isinstance(nodes, _Nodes):
        nodes = graph.nodes = _Nodes(nodes)
    return nodes


def _collect(nodes: Nodes, found: dict[str, Graph]) -> None:
    for name, node in nodes.items():
        for graph in node.subgraphs:
            if isinstance(graph, Pregel) and not any(graph is one for one in found.values()):
                found[f"{name}#{len(found)}" if name in found else name] = graph
                _collect(graph.nodes, found)


def _node(name: str, node: Any) -> Any:
    bound = _runnable(name, node.bound)
    return node if bound is node.bound else node.copy({"bound": bound})


def _runnable(name: str, runnable: Any) -> Any:
    if isinstance(runnable, Pregel):
        return SubRun(name, runnable)
    if isinstance(runnable, ToolNode):
        return _tool_node(runnable)
    if isinstance(runnable, RunnableLambda):
        return _lambda(name, runnable)
    function = getattr(runnable, "func", None)
    in_executor = getattr(runnable, "afunc", None)
    if isinstance(in_executor, partial) and in_executor.func is _IN_EXECUTOR and callable(function):
        made = copy.copy(runnable)
        made.afunc = partial(_IN_EXECUTOR, None, watched(function, name))
        return made
    return runnable


class SubRun(Runnable[Any, Any]):
    """A graph that is a step of another one: run as a run inside of that one's, in a context of its own."""

    def __init__(self, name: str, graph: Graph) -> None:
        self.name = name
        self._graph = graph

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002 - the interface
        """Not of a run, since those do not block: as the graph does it."""
        return self._graph.invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002 - the interface
        """Run it in a context of its own."""
        try:
            context = current_context()
        except ContextNotFoundError:
            return await self._graph.ainvoke(input, config, **kwargs)
        async with agent_run(context, str(self.name)):
            try:
                return await prepared(self._graph).ainvoke(input, config, **kwargs)
            except GraphBubbleUp as signal:  # it hands over, or asks a person: nothing failed
                bubbling = signal
        raise bubbling


def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function, which its run knows to be running in a thread while it does."""

    @wraps(function)
    def in_thread(*args: Any, **kwargs: Any) -> Any:
        try:
            run = current_run()
        except ContextNotFoundError:
            return function(*args, **kwargs)
        return run.in_thread(function, name)(*args, **kwargs)

    return in_thread


def _lambda(name: str, runnable: Any) -> Any:
    function = getattr(runnable, "func", None)
    if function is None or hasattr(runnable, "afunc"):
        return runnable
    made = copy.copy(runnable)
    made.func = watched(function, name)
    return made


def _tool_node(node: ToolNode) -> ToolNode:
    tools: Mapping[str, BaseTool] = {name: _tool(tool) for name, tool in node.tools_by_name.items()}
    made = copy.copy(node)
    made._tools_by_name = dict(tools)
    made.func, made.afunc = made._func, made._afunc  # which were the other node's methods
    return made


def _tool(tool: BaseTool) -> BaseTool:
    """The same tool, if it blocks with its thread watched."""
    if isinstance(tool, (StructuredTool, Tool)):
        if tool.coroutine is not None or tool.func is None:
            return tool
        return tool.model_copy(update={"func": watched(tool.func, tool.name)})
    if type(tool)._arun is not BaseTool._arun:
        return tool
    made = tool.model_copy()
    object.__setattr__(made, "_run", watched(tool._run, tool.name))
    return made
