"""One app at work: what it is told, what it says, in a task and a ``contextvars.Context`` of its own."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Self

from ucm_middleware.testing.waiting import PATIENCE
from ucm_middleware.types import ASGIApp, Message, Scope


class Conversation:
    """The app's side of one ASGI scope.

    The app runs in a task that begins in an empty ``contextvars.Context``: nothing that the test has set is visible,
    and nothing that the app sets is visible to the test or to the next conversation. No wait is longer than 15 seconds,
    after which TimeoutError says what did not come.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self.scope = scope
        self.sent: list[Message] = []
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        # Made directly, not by the loop's factory: an eager factory would run its first step in our own Context.
        self.task = asyncio.Task(
            self._run(), loop=asyncio.get_running_loop(), context=Context(), name=f"the app for {self}"
        )
        self.task.add_done_callback(lambda task: self._outbox.put_nowait(None))

    def __str__(self) -> str:
        return str(self.scope.get("path", self.scope["type"]))

    def begin(self, *messages: Message) -> Self:
        """Put these into what the app receives."""
        for message in messages:
            self._inbox.put_nowait(message)
        return self

    def cancel(self) -> None:
        """Cancel the app's task, natively, as a server that stops does."""
        self.task.cancel()

    async def next(self) -> Message | None:
        """The next message of the app; None when it has ended and there is no more."""
        async with self._patience("the app sends something or ends"):
            message = await self._outbox.get()
        if message is None:
            self._outbox.put_nowait(None)
        return message

    async def ended(self) -> None:
        """Wait until the app has returned, after its background tasks and teardown. Raises what it raised.

        After ``cancel`` that is asyncio.CancelledError, unless the app answers it otherwise.
        """
        async with self._patience("the app ends"):
            await self.task

    async def _run(self) -> None:
        await self._app(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self._outbox.put_nowait(message)

    @asynccontextmanager
    async def _patience(self, what: str) -> AsyncGenerator[None]:
        limit = asyncio.timeout(PATIENCE)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():  # it is the app's own
                raise
            raise TimeoutError(f"{self}: waited {PATIENCE:g} s in vain until {what}") from None
