"""One run that was started: its task, its deadline and its end."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

import anyio

from ucm_middleware.agents.run import AgentRun
from ucm_middleware.agents.runs import AgentRuns
from ucm_middleware.agents.stragglers import Running
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import (
    AgentError,
    AgentTimeoutError,
    ContextClosedError,
)
from ucm_middleware.lifetime import HANDLER_GRACE
from ucm_middleware.waiting import Cancelled, settle, wake

logger = logging.getLogger(__name__)


class Launch:
    """One run that was started, as whoever started it sees it."""

    __slots__ = (
        "_agent",
        "_ends",
        "_is_left",
        "_is_overdue",
        "_is_stopped",
        "_root",
        "_runs",
        "_seconds",
        "_timer",
        "_when_over",
        "run",
        "task",
    )

    task: "asyncio.Task[Any]"

    def __init__(self, agent: str, seconds: float, runs: AgentRuns, root: UserExecutionContext | None) -> None:
        self._agent = agent
        self._seconds = seconds
        self._runs = runs
        self._root = root  # the context that was opened for it, if one was
        self._ends = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._when_over: list[Callable[[], None]] = []
        self._is_left = False
        self._is_overdue = False
        self._is_stopped = False
        self.run: AgentRun | None = None

    def begins(self, run: AgentRun) -> None:
        """The run has its context: its time begins."""
        self.run = run
        self._ends = time.monotonic() + self._seconds
        run.context.lifetime.limit(self._ends, time.monotonic)
        # In an empty Context: a timer keeps its own until it is due, cancelled or not, and all that is in there.
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire, run, context=Context())

    def ended(self) -> None:
        """The task has ended."""
        # By the clock, and not by who noticed: the timer, the sweeper, or whoever used the context first.
        self._is_overdue = time.monotonic() >= self._ends
        if self._timer is not None:
            self._timer.cancel()
        self._tell_over()

    def when_over(self, call: Callable[[], None]) -> None:
        """Call this when the run is over: its task has ended, or was left behind."""
        if self._is_over:
            call()
        else:
            self._when_over.append(call)

    async def outcome(self) -> Any:
        """What the run comes to. When whoever waits is cancelled, so is the run, and is waited for.

        Raises what the agent raised, AgentTimeoutError at the deadline, ContextClosedError when the run's context was
        closed by anything else, AgentError when its stream was left.
        """
        if not self._is_over:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.when_over(partial(wake, over))
            try:
                await over
            except asyncio.CancelledError:
                await self.stop()
                raise
            except BaseException:  # thrown away, and not cancelled: it cannot wait
                self.task.cancel()
                raise
        task = self.task
        if self._is_stopped and (not task.done() or task.cancelled()):
            raise AgentError(self._agent, "was cut off, since its stream was left", "read a stream inside of its block")
        if not task.done():
            raise self._timeout("did not end, and ignored its cancellation; it is left running")
        if task.cancelled():
            if self._is_overdue:
                raise self._timeout("did not end")
            remedy = "raise CancelledError only where the task was cancelled from outside"
            raise AgentError(self._agent, "cancelled itself", remedy)
        error = task.exception()
        if error is not None and self._is_overdue and self._was_cut_off(error):
            raise self._timeout("did not end") from error
        return task.result()

    async def stop(self) -> None:
        """Cancel the run, and wait until it has ended, through any number of cancellations: for a grace, and where it
        obeys, for its releases, which have deadlines of their own.
        """
        if self._is_over:
            return
        self._is_stopped = True
        self.task.cancel()
        cancelled = Cancelled()
        with anyio.CancelScope(shield=True):
            await settle(self.task, HANDLER_GRACE, cancelled)
            while not self._is_over and self._only_releases:
                await settle(self.task, HANDLER_GRACE, cancelled)
        self._leave_behind()
        cancelled.raise_it()

    @property
    def _is_over(self) -> bool:
        return self._is_left or self.task.done()

    @property
    def _only_releases(self) -> bool:
        """Whether the agent has ended, and what its context held is being released."""
        return self.run is not None and self.run.has_ended

    def _was_cut_off(self, error: BaseException) -> bool:
        # Whatever the agent has made of its cancellation: a group, or an error of its clean-up.
        by_timer = self.run is not None and self.run.context.lifetime.reason == "expired"
        return by_timer or isinstance(error, ContextClosedError)

    def _expire(self, run: AgentRun) -> None:
        """The time is over."""
        self._ends = min(self._ends, time.monotonic())  # uvloop's timers are early, by a millisecond at most
        self._timer = asyncio.get_running_loop().call_later(HANDLER_GRACE, self._leave_behind, context=Context())
        lifetime = run.context.lifetime
        if lifetime.is_open:
            run.context.close("expired")
        elif not run.has_ended and not lifetime.is_interrupted:
            self.task.cancel()  # it closed its context itself, and nothing else would end it

    def _timeout(self, what: str) -> AgentTimeoutError:
        return AgentTimeoutError(
            self._agent,
            f"{what} within {self._seconds:g} seconds",
            "mend what it waits for, or give it a longer timeout",
        )

    def _leave_behind(self) -> None:
        """The agent ignores that it is cancelled. Its run is over all the same, and it is listed until it ends."""
        run, task = self.run, self.task
        if self._is_over or self._only_releases:
            return
        self._is_left = True
        logger.error("agent %s ignored its cancellation and was left running", self._agent)
        if run is not None:
            running = Running(run, None, threading.current_thread().name, time.monotonic())
            self._runs.stragglers.begin(running)
            task.add_done_callback(lambda _: self._runs.stragglers.end(running), context=Context())
            run.end(asyncio.CancelledError())
            run.context.close("cancelled")
        if self._root is not None:
            self._root.close("cancelled" if time.monotonic() < self._ends else "expired")
        task.add_done_callback(_retrieve, context=Context())
        self._tell_over()

    def _tell_over(self) -> None:
        calls, self._when_over = self._when_over, []
        for call in calls:
            call()


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Say how a run ended that was left behind, so that asyncio does not complain of an error nobody saw."""
    if not task.cancelled() and (raised := task.exception()) is not None:
        logger.error("a run that was left running ended", exc_info=raised)
