"""The server that a trial runs on, one after another."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from ucm_middleware.certify.server import Process, Subject, start
from ucm_middleware.certify.witness.wire import Told


@dataclass(slots=True)
class House:
    """Keeps the server running: restarts it when it is asked to, and when it has ended by itself."""

    subject: Subject
    hear: Callable[[Told], None]
    process: Process | None = None
    written: int = 0
    _open: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self) -> int:
        """Start it, or start it again. Returns its port. Raises SubjectError."""
        await self.aclose()
        self.process = await self._open.enter_async_context(start(self.subject, self.hear))
        return self.process.port

    async def aclose(self) -> None:
        """End it."""
        if self.process is not None:
            self.written += self.process.size
        await self._open.aclose()
        self._open = AsyncExitStack()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended without being told to."""
        return self.process is not None and self.process.returncode is not None
