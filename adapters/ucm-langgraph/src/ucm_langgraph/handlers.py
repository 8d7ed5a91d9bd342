"""Callback handlers: what a run tells of its models and tools, and who may call them.

LangChain calls them inline, in the very task or thread that calls the model or the tool, and what they raise keeps that
from being called.
"""

# What is asked of a handler, once, is a property there and an attribute here.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

from typing import Any, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langgraph.errors import GraphBubbleUp

from ucm_middleware import (
    AgentRun,
    ContextNotFoundError,
    ToolCall,
    UserExecutionContext,
    current_context,
    current_run,
)


class RunHandler(BaseCallbackHandler):
    """Tells of the models and tools of one run, each in the run or sub-run whose code calls it."""

    raise_error = True
    run_inline = True

    # What is nothing to tell of is not asked for either: there are many more of these calls.
    ignore_chain: Any = True
    ignore_retriever: Any = True
    ignore_retry: Any = True
    ignore_custom_event: Any = True

    def __init__(self, run: AgentRun) -> None:
        self._run = run
        self._calls: dict[UUID, ToolCall] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, **_: Any) -> None:
        """A chat model is about to be asked."""
        self._here().thinking()

    def on_llm_start(self, serialized: Any, prompts: Any, **_: Any) -> None:
        """Another kind of model is about to be asked."""
        self._here().thinking()

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """What the model thought, where it says so, is told."""
        for generations in response.generations:
            for generation in generations:
                for text in _reasoning(getattr(generation, "message", None)):
                    self._here().thinking(text)

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **given: Any) -> None:
        """A tool is about to be called."""
        name = given.get("name") or (serialized["name"] if serialized else "tool")
        call_id = given.get("tool_call_id")
        call = self._here().tool(str(name), None if call_id is None else str(call_id))
        self._calls[run_id] = call
        call.__enter__()  # left where the tool ends, perhaps in a copy of this Context

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """A tool has given its result."""
        if (call := self._calls.pop(run_id, None)) is not None:
            call.__exit__(None, None, None)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """A tool has failed, or was cancelled; or it asks a person, or hands over, and nothing failed."""
        if (call := self._calls.pop(run_id, None)) is None:
            return
        if isinstance(error, GraphBubbleUp):
            call.__exit__(None, None, None)
        else:
            call.__exit__(type(error), error, None)

    def _here(self) -> AgentRun:
        """The run that the calling code belongs to: this one, or one inside of it.

        Raises CrossUserAccessError, recorded, in another user's context.
        """
        try:
            here = current_run()
        except ContextNotFoundError:
            here = self._run
        if here.context.user_id != self._run.context.user_id:
            self._run.require_here()
        return here


class StreamHandler(RunHandler):
    """The same, which also keeps what the graph comes to."""

    ignore_chain: Any = False

    def on_chain_end(self, outputs: Any, *, parent_run_id: UUID | None = None, **_: Any) -> None:
        """The outermost one is the graph."""
        if parent_run_id is None:
            self._run.result = outputs


class OwnerGuard(BaseCallbackHandler):
    """For graphs that an application calls itself: no step, model or tool of a run is begun in another user's context.

    ``graph.with_config(callbacks=[OwnerGuard()])`` holds each run to the user in whose context it begins. With a
    context, ``{"callbacks": [OwnerGuard(current_context())]}`` in the configuration of one call, a stream is held to
    that user before it begins: LangGraph's streams do nothing until somebody reads them.

    Raises CrossUserAccessError, recorded, and ContextNotFoundError outside of any context.
    """

    raise_error = True
    run_inline = True
    ignore_retry: Any = True
    ignore_custom_event: Any = True

    def __init__(self, context: UserExecutionContext | None = None) -> None:
        self._context = context
        self._owners: dict[UUID, str] = {}

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **given: Any) -> None:
        """A graph, a step or another runnable begins."""
        self._owners[run_id] = self._owner(given.get("parent_run_id"))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """It has ended."""
        self._owners.pop(run_id, None)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """It has failed, or was broken off."""
        self._owners.pop(run_id, None)

    def on_chat_model_start(self, serialized: Any, messages: Any, **given: Any) -> None:
        """A chat model is about to be asked."""
        self._owner(given.get("parent_run_id"))

    def on_llm_start(self, serialized: Any, prompts: Any, **given: Any) -> None:
        """Another kind of model is about to be asked."""
        self._owner(given.get("parent_run_id"))

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **given: Any) -> None:
        """A tool is about to be called, which may ask models itself."""
        self._owners[run_id] = self._owner(given.get("parent_run_id"))

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """It has ended."""
        self._owners.pop(run_id, None)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """It has failed, or was broken off."""
        self._owners.pop(run_id, None)

    def on_retriever_start(self, serialized: Any, query: str, **given: Any) -> None:
        """A retriever is about to be asked."""
        self._owner(given.get("parent_run_id"))

    def _owner(self, parent: UUID | None) -> str:
        here = current_context()
        known = None if parent is None else self._owners.get(parent)
        owner = known or (here if self._context is None else self._context).user_id
        if owner != here.user_id:
            refuse(here)
        return owner


def refuse(context: UserExecutionContext) -> None:
    """Record that this context's code went on with another user's run, and raise CrossUserAccessError."""
    context.check_key("langgraph_run", "of another user", None)


def _reasoning(message: Any) -> list[str]:
    """What a message says of the model's thoughts, in either of the ways that models' packages have for it."""
    content = getattr(message, "content", None)
    texts: list[Any] = []
    if isinstance(content, list):
        blocks = [cast("dict[str, Any]", block) for block in cast("list[object]", content) if isinstance(block, dict)]
        texts = [block.get("reasoning") or block.get("thinking") for block in blocks]
    if extra := getattr(message, "additional_kwargs", None):
        texts.append(extra.get("reasoning_content"))
    return [text for text in texts if isinstance(text, str) and text]
