"""Threads and tasks of runs that have ended: nothing can stop a thread, so it is listed until it ends."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ucm_middleware.forking import renewed_after_fork

if TYPE_CHECKING:
    from ucm_middleware.agents.run import AgentRun

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Straggler:
    """What a run that has ended left running. It can do nothing through what the run's context owned.

    ``request_id`` is that of the run. ``tool`` is None where the agent itself ignored its cancellation. ``seconds`` is
    for how long it has been running.
    """

    user_id: str
    request_id: str
    agent: str
    tool: str | None
    thread: str
    seconds: float


@dataclass(slots=True, eq=False)
class Running:
    """Work of a run that nothing can stop."""

    run: "AgentRun"
    tool: str | None
    thread: str
    since: float

    def shown(self, now: float) -> Straggler:
        """As it is listed."""
        context = self.run.context
        return Straggler(
            context.user_id, context.request_id, self.run.agent_name, self.tool, self.thread, now - self.since
        )


class Stragglers:
    """What runs have under way in threads, and tasks that they left behind; of one manager. Used from any thread."""

    __slots__ = ("__weakref__", "_running")

    _running: set[Running]

    def __init__(self) -> None:
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child, which has none of the threads."""
        self._running = set()

    def watched(self, run: "AgentRun", tool: str, function: Callable[P, T]) -> Callable[P, T]:
        """The same function, which is known to be running while it does."""

        @wraps(function)
        def in_thread(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.watching(run, tool):
                return function(*args, **kwargs)

        return in_thread

    @contextmanager
    def watching(self, run: "AgentRun", tool: str) -> Generator[None]:
        """While the block runs, it is known to be running."""
        running = Running(run, tool, threading.current_thread().name, time.monotonic())
        self.begin(running)
        try:
            yield
        finally:
            self.end(running)

    def begin(self, running: Running) -> None:
        """Work began that nothing can stop."""
        self._running.add(running)

    def end(self, running: Running) -> None:
        """It has ended."""
        self._running.discard(running)

    def left_by(self, run: "AgentRun") -> int:
        """How much of it a run that ends leaves behind."""
        return sum(running.run is run for running in tuple(self._running)) if self._running else 0

    def __len__(self) -> int:
        return sum(running.run.has_ended for running in tuple(self._running))

    def listed(self) -> list[Straggler]:
        """Those whose run has ended, the oldest first."""
        late = [running for running in tuple(self._running) if running.run.has_ended]
        now = time.monotonic()
        return [running.shown(now) for running in sorted(late, key=lambda running: running.since)]
