"""One run of an agent: the context that it has for itself, and what is told of it."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import time
from collections.abc import Callable, Mapping
from itertools import count
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from ucm_middleware.agents.runs import NOTHING, AgentRuns, Phase
from ucm_middleware.agents.tools import ToolCall, Wrapped, wrapped
from ucm_middleware.audit.records import Data
from ucm_middleware.audit.redaction import text_for_record
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.errors import ContextClosedError, ContextLimitError, ContextNotFoundError
from ucm_middleware.events.envelope import Origin
from ucm_middleware.execution import managed_user_context, reason_of, require_entry, variables_here
from ucm_middleware.lifetime import INTERRUPTING

P = ParamSpec("P")
T = TypeVar("T")


class AgentRun:
    """What an adapter, a tool or an agent of the application's own does in a run. Every method may be called from any
    thread.

    ``context`` is the run's own, a child of the one that it was started in; what its ``db_session`` and ``own`` give
    out ends with the run. Each method raises CrossUserAccessError, recorded, in another user's context, and
    ContextClosedError once the run has ended.
    """

    __slots__ = (
        "__weakref__",
        "_begun",
        "_next_call",
        "_runs",
        "agent_name",
        "calls",
        "context",
        "has_ended",
        "origin",
        "result",
    )

    def __init__(self, context: UserExecutionContext, agent_name: str, runs: AgentRuns | None) -> None:
        self.context = context
        self.agent_name = agent_name
        self.has_ended = False
        self.result: Any = None
        """What a stream comes to: set by whoever drives it, for ``AgentStream.result``."""
        self.origin = Origin(context.user_id, context.thread_id, context.run_id, context.request_id)
        self.calls: dict[int, ToolCall] = {}
        self._runs = runs
        self._next_call = count(1).__next__
        self._begun = 0.0

    def __repr__(self) -> str:
        return f"<AgentRun {self.agent_name!r} {self.context.request_id}>"

    def thinking(self, text: str | None = None) -> None:
        """The agent asks its model: an "agent_thinking" event, with what it thinks where that is known. The text
        goes to the user's connections, as far as an event has room for it, and on no record.
        """
        self.require_here()
        if self._runs is not None:
            self._runs.tell(self, "agent_thinking", NOTHING if text is None else {"text": self._runs.fitting(text)})

    def tool(self, name: str, call_id: str | None = None) -> ToolCall:
        """A tool is about to be called: a "tool_executing" event. Whoever calls this sees to it that the call ends.

        ``call_id`` is what the model calls the call. Raises what the ledger raises, and then it must not be called.
        """
        self.require_here()
        self.require_going_on()
        call = ToolCall(self, self._runs, self._next_call(), name, call_id)
        call.begin()
        return call

    def wrap_tool(self, function: Wrapped, name: str | None = None) -> Wrapped:
        """The same function, synchronous or not, as a tool of this run: its calls are told, and its thread is watched.
        The call of one that yields begins and ends with the iteration.

        ``name`` is the function's own where none is given.
        """
        return wrapped(self.tool, function, name)

    def in_thread(self, function: Callable[P, T], name: str) -> Callable[P, T]:
        """The same function, to be run in a thread, as ``ToolCall.in_thread`` has it, for what is no tool: a step of a
        workflow that blocks. ``name`` is what it is listed under.
        """
        return function if self._runs is None else self._runs.stragglers.watched(self, name, function)

    def emit(self, event: str, data: object = None) -> None:
        """Send an event to the user's connections that comes from this run. Raises InvalidEventError as ``send_event``
        of the manager does; unlike that it never waits for a slow connection.
        """
        self.require_here()
        if self._runs is not None:
            self._runs.emit(self, event, data)

    def require_going_on(self) -> None:
        """Raise ContextClosedError after the run, also while its context is releasing what it holds."""
        if self.has_ended:
            lifetime = self.context.lifetime
            raise ContextClosedError(self.context.request_id, lifetime.where(), lifetime.reason or "finished")

    def require_here(self) -> None:
        """Raise CrossUserAccessError, recorded, in another user's context, and ContextClosedError after the run."""
        context = self.context
        context.require_usable()
        here = ambient_context()
        if here is not None and here.user_id != context.user_id and context.host is not None:
            context.host.require_owner(context.user_id, f"agent {self.agent_name}")

    # The beginning and the end.

    def begin(self, parameters: Mapping[str, Any]) -> None:
        """Tell of the beginning. Raises what the ledger raises, and then the run must not begin."""
        context = self.context
        context._agent_run = self
        context._lend_session()
        self._begun = time.monotonic()
        if self._runs is not None:
            shown = {"depth": context.operation_depth, "parent_request_id": context.parent_request_id}
            about: Data = (("parameters", [text_for_record(name) for name in parameters]),)
            try:
                self._runs.tell(self, "agent_started", shown, about)
            except BaseException as error:
                self.end(error)  # the user may have been told already
                raise

    def end(self, error: BaseException | None) -> None:
        """Tell of the end, once."""
        if self.has_ended:
            return
        reason = None if error is None else why_closing(self.context) or reason_of(error)
        for call in tuple(self.calls.values()):
            call.cut_off(reason or "finished")
        self.has_ended = True
        if getattr(self.context, "_agent_run", None) is self:
            self.context._agent_run = None
        if self._runs is not None:
            left = self._runs.stragglers.left_by(self)
            shown: dict[str, object] = {"stragglers": left} if left else {}
            about: Data = (("stragglers", left),) if left else ()
            if error is not None:
                shown["error"] = type(error).__name__
                about = (*about, ("error", type(error).__name__))
            phase: Phase = "agent_completed" if error is None else "agent_failed"
            self._runs.tell_end(self, phase, shown, about, self._begun, reason)

    def context_closes(self, reason: str | None) -> None:
        """The context is being closed: by somebody else, where the run is still under way, and then it is cut off."""
        if reason not in INTERRUPTING:  # else the closing sees to it
            self.context.lifetime.interrupt()


class agent_run:  # noqa: N801 - used like the functions of contextlib
    """``async with agent_run(context, "search", parameters) as run:`` is one run of an agent, for adapters to build on.

    The block runs in a child context of that name, which is closed after it, and inside of what plugins wrap agent runs
    with; a run inside of a run is a sub-agent. ``parameters`` are for plugins to see. When the context is closed from
    outside meanwhile, the block is cancelled, and ends in ContextClosedError. Raises what ``create_child_context`` and
    ``managed_user_context`` raise.
    """

    __slots__ = ("_agent_name", "_begins", "_context", "_managed", "_parameters", "_run")

    _managed: managed_user_context
    _run: AgentRun

    def __init__(
        self, context: UserExecutionContext, agent_name: str, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self._context = context
        self._agent_name = agent_name
        self._parameters: Mapping[str, Any] = NOTHING if parameters is None else parameters
        self._begins: Callable[[AgentRun], None] | None = None

    def _telling(self, begins: Callable[[AgentRun], None]) -> "agent_run":
        """Have the run known, from before the first thing in it that may take time."""
        self._begins = begins
        return self

    async def __aenter__(self) -> AgentRun:
        child = self._open()
        self._managed = managed_user_context(child)
        await self._managed.__aenter__()
        host = child.host
        self._run = run = AgentRun(child, self._agent_name, None if host is None else host.agents)
        try:
            if self._begins is not None:
                self._begins(run)
            run.begin(self._parameters)
            if host is not None and host.hooks.around_agent_run:
                around = host.hooks.around_agent_run(child, self._agent_name, self._parameters)
                await child._enter_around(around)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return run

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run.end(error)
        finally:
            await self._managed.__aexit__(kind, error, trace)

    def _open(self) -> UserExecutionContext:
        context = self._context
        require_entry(context)
        try:
            child = context.create_child_context(self._agent_name)
        except ContextLimitError as error:
            remedy = f"agent {self._agent_name!r} was not run: {error.remedy}"
            raise ContextLimitError(error.scope, error.limit, remedy) from None
        child.lifetime.variables = variables_here(context)
        if child.host is not None:
            child.host.agents.begin(child, self._agent_name)
        return child


def why_closing(context: UserExecutionContext) -> str | None:
    """In a word why a context, or one above it, is being closed; None while none is. A handler that is cut off ends
    before what it opened is closed.
    """
    node: object = context
    while isinstance(node, UserExecutionContext):
        lifetime = node.lifetime
        if lifetime.reason is not None or lifetime.is_expired or lifetime.is_lost:
            return lifetime.why
        node = node._parent
    return None


def run_around(context: UserExecutionContext) -> AgentRun | None:
    """The innermost run that a context belongs to."""
    node: object = context
    while isinstance(node, UserExecutionContext):
        run: AgentRun | None = getattr(node, "_agent_run", None)
        if run is not None:
            return run
        node = node._parent
    return None


def current_run() -> AgentRun:
    """The run that this code belongs to: the innermost one.

    Raises ContextNotFoundError outside of a run, ContextClosedError in code that outlived its context.
    """
    context = ambient_context()
    if context is not None:
        context.require_usable()
        if (run := run_around(context)) is not None:
            return run
    raise ContextNotFoundError(
        "no run of an agent here: this code runs outside of execute_with_agent(), stream_with_agent() and agent_run()"
    )
