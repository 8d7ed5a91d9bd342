"""What waits for one connection, and who sends it: a task, or a thread, that exists while something waits."""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Final

from ucm_middleware.events.delivery import DropReason
from ucm_middleware.events.envelope import Event
from ucm_middleware.events.policy import EventPolicy

logger = logging.getLogger(__name__)

HELD_UP: Final = 2
"""How many times the queue's size may wait under the policy "wait", where senders stand behind what they sent."""


class Outbox(ABC):
    """Events for one connection, in order. The hub's lock is held in ``put``, and its lock guards the queue.

    ``sent`` is the sequence of the newest event that the connection's server took.
    """

    __slots__ = ("_lock", "_policy", "_queue", "_size", "_waiters", "is_over", "is_sending", "sent")

    def __init__(self, policy: EventPolicy, lock: threading.RLock) -> None:
        self._policy = policy
        self._lock = lock
        self._queue: deque[Event] = deque()
        self._size = 0
        self._waiters: tuple[Callable[[], object], ...] = ()
        self.is_over = False
        self.is_sending = False
        self.sent = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def is_full(self) -> bool:
        """Whether more waits than may."""
        policy = self._policy
        return len(self._queue) > policy.queue_events or self._size > policy.queue_bytes

    def put(self, event: Event) -> tuple[tuple[int, DropReason], ...]:
        """Let an event wait. Returns which events are lost by it, and why; "full" means that it took none."""
        if self.is_over:
            return ((event.sequence, "gone"),)
        policy = self._policy
        queue = self._queue
        factor = HELD_UP if policy.when_full == "wait" else 1
        lost: list[tuple[int, DropReason]] = []
        while len(queue) >= policy.queue_events * factor or self._size + event.size > policy.queue_bytes * factor:
            if policy.when_full != "drop_oldest":
                return ((event.sequence, "full"),)
            oldest = queue.popleft()
            self._size -= oldest.size
            lost.append((oldest.sequence, "oldest"))
        self.put_anyway(event)
        return tuple(lost)

    def put_anyway(self, event: Event) -> None:
        """Let an event wait that is within another bound, such as that of what is kept."""
        self._queue.append(event)
        self._size += event.size

    def end(self) -> None:
        """The connection is over: nothing is sent any more."""
        self.is_over = True
        self._queue.clear()
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
                self.is_sending = False
                return None
            event = self._queue.popleft()
            self._size -= event.size
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
        # In a Context of its own: the sender's, which may be another user's, has no business in it.
        self._task = asyncio.Task(self._send_all(), loop=self._loop, name="ucm-middleware events", context=Context())

    async def _send_all(self) -> None:
        try:
            while (event := self._next()) is not None:
                await self._send(event.text)
                self.sent = event.sequence
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
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.cancel)


class ThreadOutbox(Outbox):
    """For a connection that a thread serves: ``send`` blocks, and is called in a thread of its own."""

    __slots__ = ("_send",)

    def __init__(self, send: Callable[[str], None], policy: EventPolicy, lock: threading.RLock) -> None:
        super().__init__(policy, lock)
        self._send = send

    def wake(self) -> None:
        if self._begin_sending():
            threading.Thread(target=self._send_all, name="ucm-middleware events", daemon=True).start()

    def _send_all(self) -> None:
        try:
            while (event := self._next()) is not None:
                self._send(event.text)
                self.sent = event.sequence
        except Exception as error:  # noqa: BLE001 - whatever the server raises
            self._failed(error)

    def _stop_sending(self) -> None:
        """The connection's own end breaks off what blocks."""
