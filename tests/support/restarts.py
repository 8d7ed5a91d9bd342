"""A Valkey that tests kill and start again at the same port, where it then is new and empty."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from signal import SIGKILL

from .processes import HOST, held_port
from .valkey import ADMIN, ValkeyServer, start_valkey


class Restarts:
    """One store's place; `restartable_valkey` makes it. ``server`` is what runs there, or ran last."""

    def __init__(self, port: int, options: tuple[str, ...]) -> None:
        self.port = port
        self._options = options
        self._running = ExitStack()
        self.server = self.start()

    def start(self) -> ValkeyServer:
        """Start it, empty."""
        self.server = self._running.enter_context(start_valkey(*self._options, port=self.port))
        return self.server

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.server.program.stop(SIGKILL)
        self._running.close()

    def close(self) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        """Where it is, for a worker."""
        return url_at(self.port)


def url_at(port: int) -> str:
    """The URL of a store, or of a proxy to it, for a worker."""
    return f"valkey://:{ADMIN}@{HOST}:{port}"


@contextmanager
def restartable_valkey(*options: str) -> Generator[Restarts]:
    """One that runs and that a test may kill, and start again."""
    with held_port() as port:
        store = Restarts(port, options)
        try:
            yield store
        finally:
            store.close()
