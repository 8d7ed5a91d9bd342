"""Which agent has the word in one run of the SDK's loop, and as which run of ours."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ucm_middleware import AgentRun, ToolCall, UserContextError, UserExecutionContext, agent_run


class Flow:
    """One loop of the SDK. ``current`` is the run of the agent that has the word: the first one's, or a hand-off's."""

    __slots__ = ("_calls", "_handoff", "_tasks", "current", "has_answered", "refused", "root")

    def __init__(self, run: AgentRun) -> None:
        self.root = self.current = run
        self.has_answered = False
        self.refused: UserContextError | None = None
        """Why it must not go on. Where the loop is that of a tool, the SDK would tell the model, and go on."""
        self._handoff: _Handoff | None = None
        self._calls: dict[str, ToolCall] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def hand_over(self, name: str) -> UserExecutionContext:
        """Another agent takes over: as a sub-run of the first one, beside those that had the word before. Returns its
        context.

        A conversation handed over many times does so beside itself, and not ever deeper.
        """
        await self._take_back(None)
        self._handoff = handoff = _Handoff(self.root.context, name)
        self.current = await handoff.begun()
        return self.current.context

    def thinking(self) -> None:
        """The model is asked. Raises as ``AgentRun.thinking`` does, as what follows raises as its methods do."""
        with self._remembering():
            self.current.thinking()

    def require_here(self) -> None:
        """See ``AgentRun.require_here``."""
        with self._remembering():
            self.current.require_here()

    def begin_call(self, name: str, call_id: str) -> None:
        """A tool begins that cannot tell of itself."""
        with self._remembering():
            self._calls[call_id] = self.current.tool(name, call_id)

    def end_call(self, call_id: str) -> None:
        """It has ended. The run's end cuts off what nobody ends."""
        call = self._calls.pop(call_id, None)
        if call is not None:
            call.end()

    def add_task(self, task: "asyncio.Task[Any]") -> None:
        """An asynchronous tool runs in this task."""
        self._tasks.add(task)

    def discard_task(self, task: "asyncio.Task[Any]") -> None:
        """It has ended."""
        self._tasks.discard(task)

    async def end(self, error: BaseException | None) -> None:
        """The loop has ended. The SDK cancels its tools and does not wait for them: they are waited for here."""
        while tasks := [task for task in self._tasks if task is not asyncio.current_task()]:
            await asyncio.wait(tasks)
        await self._take_back(error)

    def refuse(self, error: UserContextError) -> None:
        """Remember why the loop must not go on."""
        self.refused = error

    @contextmanager
    def _remembering(self) -> Generator[None]:
        try:
            yield
        except UserContextError as error:
            self.refuse(error)
            raise

    async def _take_back(self, error: BaseException | None) -> None:
        handoff, self._handoff = self._handoff, None
        self.current = self.root
        if handoff is not None:
            await handoff.end(error)


class _Handoff:
    """A sub-run that one task holds open, since hooks of the SDK run in tasks of their own, each in another Context."""

    __slots__ = ("_begun", "_over", "_task")

    def __init__(self, context: UserExecutionContext, name: str) -> None:
        loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[AgentRun] = loop.create_future()
        self._over: asyncio.Future[BaseException | None] = loop.create_future()
        self._task = loop.create_task(self._hold(context, name))

    async def begun(self) -> AgentRun:
        await asyncio.wait((self._begun,))  # a future that was awaited would be cancelled with whoever waits
        return self._begun.result()

    async def end(self, error: BaseException | None) -> None:
        if not self._over.done():
            self._over.set_result(error)
        await asyncio.wait((self._task,))

    async def _hold(self, context: UserExecutionContext, name: str) -> None:
        try:
            async with agent_run(context, name) as run:
                self._begun.set_result(run)
                error = await self._over
                if error is not None:
                    raise error
        except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - it is handed on
            # An error of the loop goes its own way there. One of the beginning is for whoever waits for that.
            if not self._begun.done():
                self._begun.set_exception(raised)


_flow: ContextVar[Flow | None] = ContextVar("ucm_openai_agents_flow", default=None)


def current_flow() -> Flow | None:
    """The loop that this code runs in, a tool's thread included."""
    return _flow.get()


def enter_flow(flow: Flow) -> Flow:
    """Make it the one of this task, and of all that it starts."""
    _flow.set(flow)
    return flow
