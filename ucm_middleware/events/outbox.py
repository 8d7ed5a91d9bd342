"""What waits for one connection, and who sends it: a task, or a thread, that exists while something waits."""

import asyncio
import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any, Final

from ucm_middleware.events.delivery import DropReason
from ucm_middleware.events.envelope import Event
from ucm_middleware.events.policy import EventPolicy

logger = logging.getLogger(__name__)

SENDER: Final = "ucm-middleware events"
"""What the tasks and threads that send are called."""

HELD_UP: Final = 2
"""How many times the queue's size may wait under the policy "wait", where senders stand behind what they sent."""

NOTHING: Final[deque[Event]] = deque(maxlen=0)
"""Stands for an empty queue: one of its own would take 760 bytes of each idle connection."""


class Outbox(ABC):
    """Events for one connection, in order. The hub's lock is held in ``put``, and its lock guards the queue.

    ``placed`` counts the events that were ever put in line here, which gives each a place in it; ``sent`` is the place
    of the newest one that the connection's server took. A sequence would not do: they begin anew when a connection is
    bound to its user, and when that user's events are purged.
    """

    __slots__ = (
        "_extra_events",
        "_extra_size",
        "_lock",
        "_policy",
        "_queue",
        "_sending",
        "_size",
        "_waiters",
        "is_over",
        "is_sending",
        "placed",
        "sent",
    )

    def __init__(self, policy: EventPolicy, lock: threading.RLock) -> None:
        self._policy = policy
        self._lock = lock
        self._queue: deque[Event] = NOTHING
        self._size = 0
        self._extra_events = 0
        self._extra_size = 0
        self._waiters: tuple[Callable[[], object], ...] = ()
        self.is_over = False
        self.is_sending = False
        self.placed = 0
        self.sent = 0
        self._sending = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def is_full(self) -> bool:
        """Whether more waits than may."""
        return self._is_more(1, len(self._queue), self._size)

    @property
    def is_replaying(self) -> bool:
        """Whether some of what was replayed waits still."""
        return self._extra_events > 0

    def put(self, event: Event) -> tuple[tuple[int, DropReason], ...]:
        """Let an event wait. Returns which events are lost by it, and why; "full" means that it took none."""
        if self.is_over:
            return ((event.sequence, "gone"),)
        queue = self._queue
        when_full = self._policy.when_full
        factor = HELD_UP if when_full == "wait" else 1
        lost: list[tuple[int, DropReason]] = []
        while self._is_more(factor, len(queue) + 1, self._size + event.size):
            if when_full != "drop_oldest":
                return ((event.sequence, "full"),)
            oldest = queue.popleft()
            self._size -= oldest.size
            lost.append((oldest.sequence, "oldest"))
        self._append(event)
        return tuple(lost)

    def replay(self, event: Event) -> None:
        """Let an event wait that was kept, which has a bound of its own. Until all of this is sent, so much more may
        wait here: a client that has only come back is not slow.
        """
        self._extra_events += 1
        self._extra_size += event.size
        self._append(event)

    def _append(self, event: Event) -> None:
        if not self._queue:
            self._queue = deque()
        self._queue.append(event)
        self._size += event.size
        self.placed += 1

    def _is_more(self, factor: int, events: int, size: int) -> bool:
        """Whether it is more than may wait, so many times over."""
        policy = self._policy
        return (
            events > policy.queue_events * factor + self._extra_events
            or size > policy.queue_bytes * factor + self._extra_size
        )

    def end(self) -> None:
        """The connection is over: nothing is sent any more."""
        self.is_over = True
        self._queue = NOTHING
        self._size = 0
        self._tell_waiters()
        self._stop_sending()

    def when_room(self, tell: Callable[[], object]) -> None:
        """Call this, in any thread, once no more waits than may, or nothing is sent any more."""
        with self._lock:
            if self.is_full and not self.is_over:
                self._waiters = (*self._waiters, tell)
                return
        tell()

    @abstractmethod
    def wake(self) -> None:
        """Have what waits sent."""

    @abstractmethod
    def _stop_sending(self) -> None:
        """Break off what is being sent."""

    def _begin_sending(self) -> bool:
        """Whether somebody must begin to send, which is from now on the caller."""
        with self._lock:
            if self.is_sending or self.is_over or not self._queue:
                return False
            self.is_sending = True
            return True

    def _next(self) -> Event | None:
        """The event to be sent next; None when there is none, and whoever asked must stop."""
        with self._lock:
            if not self._queue:
                self._queue = NOTHING
                self.is_sending = False
                return None
            event = self._queue.popleft()
            self._size -= event.size
            self._sending = self.placed - len(self._queue)
            if not self._queue:
                self._extra_events = self._extra_size = 0
            if self._waiters and not self.is_full:
                self._tell_waiters()
            return event

    def _tell_waiters(self) -> None:
        waiters, self._waiters = self._waiters, ()
        for tell in waiters:
            tell()

    def _failed(self, error: Exception) -> None:
        """The server took no more: the client has gone. What waits can be had by coming back."""
        logger.debug("an event could not be sent, its connection is over: %s", error)
        with self._lock:
            self.is_sending = False
            self.end()


class TaskOutbox(Outbox):
    """For a connection that lives on an event loop: ``send`` is awaited there."""

    __slots__ = ("_loop", "_send", "_task")

    def __init__(
        self,
        send: Callable[[str], Awaitable[None]],
        loop: asyncio.AbstractEventLoop,
        policy: EventPolicy,
        lock: threading.RLock,
    ) -> None:
        super().__init__(policy, lock)
        self._send = send
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        if not self._begin_sending():
            return
        if asyncio._get_running_loop() is self._loop:
            self._start()
            return
        try:
            self._loop.call_soon_threadsafe(self._start, context=Context())
        except RuntimeError as error:  # its loop is closed, and the connection with it
            self._failed(error)

    def _start(self) -> None:
        task = _begun(self._send_all(), self._loop)
        if not task.done():
            self._task = task
            if self.is_over:  # another thread ended it meanwhile, and found no task to stop
                task.cancel()

    async def _send_all(self) -> None:
        try:
            while (event := self._next()) is not None:
                await self._send(event.text)
                self.sent = self._sending
        except Exception as error:  # noqa: BLE001 - whatever servers raise, each in its own way
            self._failed(error)
        finally:
            self._task = None

    def _stop_sending(self) -> None:
        task = self._task
        if task is None:
            return
        if asyncio._get_running_loop() is self._loop:
            task.cancel()
            return
        with suppress(RuntimeError):  # its loop is closed, and the task with it
            self._loop.call_soon_threadsafe(task.cancel, context=Context())


def _begun(sending: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
    """A task in a Context of its own: the sender's, which may be another user's, has no business in it.

    Where Python can, it begins at once, and has no need of the loop when the server takes all without waiting.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(sending, loop=loop, name=SENDER, context=Context(), eager_start=True)
    return asyncio.Task(sending, loop=loop, name=SENDER, context=Context())


class ThreadOutbox(Outbox):
    """For a connection that a thread serves: ``send`` blocks, and is called in a thread of its own.

    ``over`` is called once nothing is sent any more, with the hub's lock held: it must not wait.
    """

    __slots__ = ("_over", "_send")

    def __init__(
        self, send: Callable[[str], None], over: Callable[[], None], policy: EventPolicy, lock: threading.RLock
    ) -> None:
        super().__init__(policy, lock)
        self._send = send
        self._over = over

    def wake(self) -> None:
        if not self._begin_sending():
            return
        try:
            threading.Thread(target=self._send_all, name=SENDER, daemon=True).start()
        except RuntimeError as error:  # there are too many threads; the sender has others to send to
            self._failed(error)

    def _send_all(self) -> None:
        try:
            while (event := self._next()) is not None:
                self._send(event.text)
                self.sent = self._sending
        except Exception as error:  # noqa: BLE001 - whatever the server raises
            self._failed(error)

    def _stop_sending(self) -> None:
        """The connection's own end breaks off what blocks."""
        self._over()
