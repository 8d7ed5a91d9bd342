"""The policy "wait" of a queue. Senders in other workers cannot be held up: it is waited for here, and then closed."""

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial

from ucm_middleware.cluster.worker import Worker
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.events.channel import Connection
from ucm_middleware.events.policy import EventPolicy


class Room:
    """Minds connections whose queue is full; on the cluster's thread. ``close`` closes one that got no room in time."""

    __slots__ = ("_close", "_overdue", "_policy", "_worker")

    def __init__(self, worker: Worker, policy: EventPolicy, close: Callable[[UserExecutionContext], object]) -> None:
        self._worker = worker
        self._policy = policy
        self._close = close
        self._overdue: dict[Connection, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._overdue)

    def mind(self, connection: Connection) -> None:
        """See to it that this one gets room in time, or is closed."""
        policy = self._policy
        outbox = connection.outbox
        if policy.when_full != "wait" or not outbox.is_full or outbox.is_over or connection in self._overdue:
            return
        loop = asyncio.get_running_loop()
        self._overdue[connection] = loop.call_later(
            policy.wait_seconds, self._is_overdue, connection, context=Context()
        )
        outbox.when_room(partial(self._worker.call, self._has_room, connection))

    def _has_room(self, connection: Connection) -> None:
        timer = self._overdue.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self.mind(connection)  # it may be full again by now

    def _is_overdue(self, connection: Connection) -> None:
        self._overdue.pop(connection, None)
        if connection.outbox.is_full:
            self._close(connection.context)
