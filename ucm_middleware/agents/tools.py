"""One call of a tool, in one run of an agent."""

import inspect
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, aclosing, closing, contextmanager, nullcontext
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar, cast

from ucm_middleware.audit.records import Data
from ucm_middleware.audit.redaction import text_for_record
from ucm_middleware.callables import body_of, is_asynchronous
from ucm_middleware.execution import reason_of

if TYPE_CHECKING:
    from ucm_middleware.agents.run import AgentRun
    from ucm_middleware.agents.runs import AgentRuns

P = ParamSpec("P")
T = TypeVar("T")
Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])

MOST_SHOWN: Final = 256
"""Characters of a tool's name and of a call's id in an event. Both come from a model, which may have written anything,
and what the one event has room for, the one of the end must have too.
"""


class ToolCall:
    """``with run.tool("search") as call:`` around the call itself, in the thread that makes it: its span is then the
    current one. Or ``call.end()``, from anywhere. What has not ended when the run ends is cut off with it.
    """

    __slots__ = ("_begun", "_leave_span", "_run", "_runs", "call_id", "name", "number")

    def __init__(self, run: "AgentRun", runs: "AgentRuns | None", number: int, name: str, call_id: str | None) -> None:
        self._run = run
        self._runs = runs
        self.number = number
        self.name = name
        self.call_id = call_id
        self._begun = time.monotonic()
        self._leave_span: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<ToolCall {self.name!r} of {self._run!r}>"

    def begin(self) -> None:
        """Tell of it. Raises what the ledger raises, and ContextClosedError when the run has ended meanwhile."""
        if self._runs is not None:
            self._runs.tell(self._run, "tool_executing", self._shown(), self._about())
        self._run.calls[self.number] = self
        if self._run.has_ended:  # looked at last: who ended it has cut off what it found
            self.cut_off("finished")
            self._run.require_going_on()

    def end(self, error: BaseException | None = None) -> None:
        """Tell of its end: a "tool_completed" event, with the kind of the error where it failed. The first counts."""
        if self._run.calls.pop(self.number, None) is not None:
            self._tell_end(None if error is None else reason_of(error), error)

    def cut_off(self, reason: str) -> None:
        """The run ends before it does."""
        if self._run.calls.pop(self.number, None) is not None:
            self._tell_end(reason, None)

    def in_thread(self, function: Callable[P, T]) -> Callable[P, T]:
        """The same function, to be run in a thread. Nothing can stop that: where it outlives its run it can do nothing
        through what the run's context owned, and ``get_stragglers`` of the manager lists it until it ends.
        """
        return function if self._runs is None else self._runs.stragglers.watched(self._run, self.name, function)

    def listed(self) -> AbstractContextManager[None]:
        """The same of a block, as of a coroutine that a framework runs on a loop of its own, in a thread."""
        return nullcontext() if self._runs is None else self._runs.stragglers.watching(self._run, self.name)

    def __enter__(self) -> Self:
        if self._runs is not None:
            self._leave_span = self._runs.enter_tool(self._run, self.number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave_span, self._leave_span = self._leave_span, None
        if leave_span is not None:
            leave_span()
        self.end(error)

    def _tell_end(self, reason: str | None, error: BaseException | None) -> None:
        if self._runs is None:
            return
        shown, about = self._shown(), self._about()
        if error is not None:
            shown["error"] = type(error).__name__
            about = (*about, ("error", type(error).__name__))
        self._runs.tell_end(self._run, "tool_completed", shown, about, self._begun, reason)

    def _shown(self) -> dict[str, object]:
        call_id = None if self.call_id is None else self.call_id[:MOST_SHOWN]
        return {"tool": self.name[:MOST_SHOWN], "call_id": call_id, "call": self.number}

    def _about(self) -> Data:
        about: Data = ("tool", text_for_record(self.name)), ("call", self.number)
        return about if self.call_id is None else (*about, ("call_id", text_for_record(self.call_id)))


def wrapped(call: Callable[[str], ToolCall], function: Wrapped, name: str | None) -> Wrapped:
    """See ``AgentRun.wrap_tool``."""
    shown = str(name or getattr(function, "__name__", type(function).__name__))

    @wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with call(shown) as made, made.listed():
            return await function(*args, **kwargs)

    @wraps(function)
    async def iterated(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        with _between_items(call(shown)):
            async with aclosing(function(*args, **kwargs)) as items:
                async for item in items:
                    yield item

    @wraps(function)
    def stepped(*args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
        with _between_items(call(shown)) as made, closing(function(*args, **kwargs)) as items:
            while True:
                try:
                    with made.listed():  # in whichever thread asks for the next one
                        item = next(items)
                except StopIteration as end:
                    return end.value
                yield item

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with call(shown) as made, made.listed():
            return function(*args, **kwargs)

    if is_asynchronous(function):
        return cast("Wrapped", awaited)
    body = body_of(function)
    if inspect.isasyncgenfunction(body):
        return cast("Wrapped", iterated)
    return cast("Wrapped", stepped if inspect.isgeneratorfunction(body) else called)


@contextmanager
def _between_items(made: ToolCall) -> Generator[ToolCall]:
    """A call that ends with the block. Its span is not the current one: between two items, others run."""
    try:
        yield made
    except BaseException as error:
        made.end(error)
        raise
    made.end()
