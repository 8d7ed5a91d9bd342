"""Real ASGI servers, each a process of its own on a free port of the loopback interface.

The port is held by this process for as long as the server lives: it is bound here, never listened on, with the socket
options that let the server bind it too. The kernel hands it to nobody else, and until the server listens, connections
are refused. All three servers listen after the lifespan startup, so the first connection accepted means that the app
is up. It needs POSIX process groups and ``SO_REUSEPORT``: Linux is what it is tested on.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.testing.waiting import PATIENCE, wait_until

HOST: Final = "127.0.0.1"

ServerKind = Literal["uvicorn", "hypercorn", "granian"]

_STARTING: Final = 3 * PATIENCE
"""Seconds until a server that neither ends nor listens is given up: an agent framework takes five to import, alone."""


def _uvicorn(port: int) -> list[str]:
    return ["uvicorn", "--host", HOST, "--port", str(port), "--no-access-log"]


def _hypercorn(port: int) -> list[str]:
    # No worker processes: hypercorn then serves in the process we started.
    return ["hypercorn", "--bind", f"{HOST}:{port}", "--workers", "0", "--worker-class", "asyncio"]


def _granian(port: int) -> list[str]:
    # One worker is always a process of its own, and has one thread that runs Python.
    return [
        *("granian", "--interface", "asgi", "--host", HOST, "--port", str(port)),
        *("--workers", "1", "--loop", "asyncio"),
    ]


_COMMANDS: Final[Mapping[str, Callable[[int], list[str]]]] = {
    "uvicorn": _uvicorn,
    "hypercorn": _hypercorn,
    "granian": _granian,
}


class Server:
    """One running server; ``start_server`` makes them.

    ``kind`` is which one it is, ``port`` where it listens, on 127.0.0.1.
    """

    def __init__(self, kind: str, port: int, process: subprocess.Popen[bytes], log: int) -> None:
        self.kind = kind
        self.port = port
        self._process = process
        self._log = log
        self._told_to_end = False

    def __repr__(self) -> str:
        return f"<Server {self.kind} pid {self._process.pid} at {self.url}>"

    @property
    def url(self) -> str:
        """Where it answers HTTP, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """Where it answers WebSocket handshakes."""
        return f"ws://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process that was started; granian's worker is a child of it."""
        return self._process.pid

    @property
    def output(self) -> str:
        """All that the server and the app have written to stdout and stderr so far."""
        # The descriptor's offset is shared with the server's own writes: read without moving it.
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal's number if a signal ended it; None while it runs."""
        return self._process.poll()

    def wait_for_output(self, text: str, *, timeout: float = PATIENCE) -> None:
        """Wait until ``text`` is in the output.

        Raises AssertionError with the output if the server ends without it, TimeoutError after ``timeout`` seconds.
        """

        def seen() -> bool:
            ended = self.returncode is not None
            if text in self.output:
                return True
            if ended:
                raise AssertionError(self._story(f"ended without writing {text!r}"))
            return False

        wait_until(seen, f"{self!r} writes {text!r}", timeout=timeout)

    def stop(self, sig: signal.Signals = signal.SIGTERM, *, timeout: float = PATIENCE) -> int:
        """Ask it to end, wait, and return its exit status. uvicorn ends by the signal itself, the others with 0.

        Raises AssertionError with its output if it does not end within ``timeout`` seconds; it is killed then.
        """
        self._told_to_end = True
        self._process.send_signal(sig)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self._story(f"still ran {timeout:g} s after {sig.name}")) from None

    def kill(self) -> None:
        """End it at once with SIGKILL, its worker process included."""
        self._told_to_end = True
        if self.returncode is None:
            # It leads a process group of its own, so this reaches its children and nobody else.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_until_up(self) -> None:
        """Wait for the first connection that it accepts. Raises AssertionError with its output if it ends before."""

        def accepts() -> bool:
            if self.returncode is not None:
                raise AssertionError(self._story("ended while starting"))
            with socket.socket() as probe:
                return probe.connect_ex((HOST, self.port)) == 0

        wait_until(accepts, f"{self!r} accepts connections", timeout=_STARTING)

    def end(self) -> None:
        """Stop it unless the test did. Raises AssertionError with its output if it had ended by itself."""
        if self._told_to_end:
            self.kill()
        elif self.returncode is not None:
            raise AssertionError(self._story("ended by itself"))
        else:
            self.stop()

    def _story(self, what: str) -> str:
        return f"{self!r} {what} (exit status {self.returncode}). Its output:\n{self.output}"


@contextmanager
def start_server(
    app: str,
    *,
    app_dir: Path,
    kind: ServerKind = "uvicorn",
    env: Mapping[str, str | None] | None = None,
    options: Sequence[str] = (),
) -> Generator[Server]:
    """Run ``app`` on a real server, up and listening inside the block.

    ``app`` is "module:attribute"; the module is looked for in ``app_dir``, the server's working directory, and where
    this process finds its own. ``env`` is added to this process's environment; a value of None removes the variable.
    ``options`` are further command line options of the server.

    Raises ConfigurationError when the server is not installed, AssertionError with its output when it ends before the
    block does.
    """
    if kind not in _COMMANDS:
        raise ConfigurationError(f"kind must be one of {', '.join(_COMMANDS)}, not {kind!r}")
    if find_spec(kind) is None:
        raise ConfigurationError(f"{kind} is not installed: add it to what your tests depend on")
    with run_server(kind, lambda port: [*_COMMANDS[kind](port), *options, app], app_dir=app_dir, env=env) as server:
        yield server


@contextmanager
def run_server(
    kind: str, command: Callable[[int], Sequence[str]], *, app_dir: Path, env: Mapping[str, str | None] | None = None
) -> Generator[Server]:
    """The same with a server of any kind: ``command`` makes of the port what follows ``python -m``."""
    with held_port() as port, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command(port)],
            cwd=app_dir,
            env=environment_of(app_dir, env or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(kind, port, process, log.fileno())
        try:
            server.wait_until_up()
            yield server
            server.end()
        finally:
            server.kill()
            # pytest captures this, and shows it only for tests that failed.
            sys.stdout.write(f"Output of {server!r}:\n{server.output}\n")


@contextmanager
def held_port() -> Generator[int]:
    """A free port of the loopback interface, which nobody else is given meanwhile and a server can bind."""
    with socket.socket() as holder:
        # Linux lets a second socket bind a port that nobody listens on if both set SO_REUSEADDR; granian also
        # sets SO_REUSEPORT, which both must do as well.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((HOST, 0))
        port: int = holder.getsockname()[1]
        yield port


def environment_of(app_dir: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with changes, for a server that imports from ``app_dir`` and as this one does."""
    # The app must import the very modules that the tests import, be they a checkout or installed. An empty entry would
    # mean the server's working directory instead of ours.
    path = [str(app_dir), *(entry or os.getcwd() for entry in sys.path)]
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **changes}
    return {name: value for name, value in merged.items() if value is not None}
