"""What tests of events share: clients in this process that may stop reading, and connections of users."""

import asyncio
import json
from typing import Any

from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_middleware.events.channel import Connection, LastEvent
from ucm_middleware.events.outbox import TaskOutbox

Envelope = dict[str, Any]


class Client:
    """What came over one connection. While it is stalled, the server's send waits, as it does behind a full socket."""

    def __init__(self) -> None:
        self.frames: list[str] = []
        self.error: Exception | None = None
        self._reading = asyncio.Event()
        self._reading.set()

    async def send(self, text: str) -> None:
        """What the server offers its adapters."""
        await self._reading.wait()
        if self.error is not None:
            raise self.error
        self.frames.append(text)

    def stall(self) -> None:
        self._reading.clear()

    def read_on(self) -> None:
        self._reading.set()

    @property
    def envelopes(self) -> list[Envelope]:
        return [json.loads(frame) for frame in self.frames]

    @property
    def data(self) -> list[Any]:
        """The data of each event, in the order they came."""
        return [envelope["data"] for envelope in self.envelopes]


def connect(
    manager: UserContextManager,
    user_id: str | None,
    after: tuple[str | None, int | None] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> tuple[UserExecutionContext, Client, TaskOutbox]:
    """A WebSocket connection as the middleware makes them, without a server. ``after`` is the last event it names."""
    context, client = open_connection(manager, user_id)
    return context, client, accept(manager, context, client, after, loop)


def open_connection(manager: UserContextManager, user_id: str | None) -> tuple[UserExecutionContext, Client]:
    """One whose handshake is not answered yet."""
    return manager._open_for_connection(user_id, None, None, websocket=True), Client()


def accept(
    manager: UserContextManager,
    context: UserExecutionContext,
    client: Client,
    after: tuple[str | None, int | None] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> TaskOutbox:
    """Answer it."""
    hub = manager._hub
    outbox = TaskOutbox(client.send, loop or asyncio.get_running_loop(), hub.policy, hub.lock)
    hub.join(Connection(context, outbox, None if after is None else LastEvent(*after)))
    return outbox


async def settled() -> None:
    """Let the loop do all that it can do by now."""
    for _ in range(10):
        await asyncio.sleep(0)
