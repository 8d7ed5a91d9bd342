"""Reading a request ahead of the app, to notice at once that the client has gone."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from ucm_middleware.types import Message, Receive, Send

MOST_MESSAGES: Final = 16
"""How far the reading runs ahead. A client that sends more than the app reads waits, as it would without this."""


LAST_MESSAGES: Final = frozenset(
    {"http.response.body", "http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"}
)
"""What can end a response, unless it says that more is to come."""


class ReadAhead:
    """Stands between the server and the app. Calls ``gone`` when the client leaves before it has its whole response.

    Servers tell an application of a disconnect only when it asks for the next message, which a handler that waits for
    something else never does.
    """

    __slots__ = ("_answered", "_gone", "_messages", "_receive", "_send", "_taken", "_task", "_there")

    def __init__(self, receive: Receive, send: Send, gone: Callable[[], None]) -> None:
        self._receive = receive
        self._send = send
        self._answered = False
        self._gone = gone
        self._messages: deque[Message] = deque()
        self._there = asyncio.Event()
        self._taken = asyncio.Event()
        self._task: asyncio.Task[None] | None = asyncio.Task(
            self._read(), loop=asyncio.get_running_loop(), name="ucm-middleware read ahead"
        )

    async def receive(self) -> Message:
        """The next message, in the order the server gave them. A disconnect is given again to each further call."""
        while not self._messages:
            if self._task is None or self._task.done():
                return await self._receive()
            self._there.clear()
            await self._there.wait()
        message = self._messages[0]
        if message["type"] != "http.disconnect":
            self._messages.popleft()
            self._taken.set()
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, and note the last one: after it, servers report a disconnect in any case."""
        if message["type"] in LAST_MESSAGES and not (message.get("more_body") or message.get("more_trailers")):
            self._answered = True
        return self._send(message)

    def stop(self) -> None:
        """Read no further."""
        # Without the task: what it was cancelled with holds its frame, which holds this.
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _read(self) -> None:
        try:
            while True:
                while len(self._messages) >= MOST_MESSAGES:
                    self._taken.clear()
                    await self._taken.wait()
                message = await self._receive()
                self._messages.append(message)
                self._there.set()
                if message["type"] == "http.disconnect":
                    if not self._answered:
                        self._gone()
                    return
        finally:
            self._there.set()
