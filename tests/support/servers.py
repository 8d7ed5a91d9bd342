"""Real ASGI servers, started by the tests as subprocesses on loopback.

Each server listens on a port that this process holds for as long as the server lives: it is bound here, never listened
on, with the socket options that let the server bind it too. The kernel hands it to nobody else, and until the server
listens, connections are refused. All of these servers listen after the lifespan startup, so the first connection
accepted means that the app is up.
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

from .waiting import PATIENCE, wait_until

HOST = "127.0.0.1"


def _uvicorn(http: str, loop: str) -> Callable[[int], list[str]]:
    return lambda port: [
        *("uvicorn", "--host", HOST, "--port", str(port)),
        *("--http", http, "--loop", loop, "--no-access-log"),
    ]


def _hypercorn(port: int) -> list[str]:
    # No worker processes: hypercorn then serves in the process we started.
    return ["hypercorn", "--bind", f"{HOST}:{port}", "--workers", "0", "--worker-class", "asyncio"]


def _granian(port: int) -> list[str]:
    # One worker is always a process of its own, and has one thread that runs Python.
    return [
        *("granian", "--interface", "asgi", "--host", HOST, "--port", str(port)),
        *("--workers", "1", "--loop", "asyncio"),
    ]


_COMMANDS: dict[str, Callable[[int], list[str]]] = {
    "uvicorn-h11": _uvicorn("h11", "asyncio"),
    "uvicorn-httptools": _uvicorn("httptools", "asyncio"),
    "uvicorn-uvloop": _uvicorn("httptools", "uvloop"),
    "hypercorn": _hypercorn,
    "granian": _granian,
}

SERVER_KINDS = tuple(_COMMANDS)
"""Every kind of server that the promises are proved on."""


class Server:
    """One running server; `start_server` makes them.

    Attributes:
        kind: one of `SERVER_KINDS`.
        port: where it listens, on `HOST`.
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
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
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
        """Wait until `text` is in the output; `AssertionError` with the output if the server ends without it."""

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

        `AssertionError` with its output if it does not end within `timeout` seconds; it is killed then.
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
        """Wait for the first connection that it accepts; `AssertionError` with its output if it ends before."""

        def accepts() -> bool:
            if self.returncode is not None:
                raise AssertionError(self._story("ended while starting"))
            with socket.socket() as probe:
                return probe.connect_ex((HOST, self.port)) == 0

        wait_until(accepts, f"{self!r} accepts connections")

    def end(self) -> None:
        """Stop it unless the test did; `AssertionError` with its output if it had ended by itself."""
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
    kind: str,
    app: str,
    *,
    app_dir: Path,
    env: Mapping[str, str | None] | None = None,
    options: Sequence[str] = (),
) -> Generator[Server]:
    """Run `app` ("module:attribute", in `app_dir`) on a server of `kind`, up and listening inside the block.

    Args:
        env: added to this process's environment; a value of None removes the variable.
        options: further command line options for the server.
    """
    with _held_port() as port, tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", *_COMMANDS[kind](port), *options, app]
        process = subprocess.Popen(
            command,
            cwd=app_dir,
            env=_environment(app_dir, env or {}),
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
            print(f"Output of {server!r}:\n{server.output}")


@contextmanager
def _held_port() -> Generator[int]:
    with socket.socket() as holder:
        # Linux lets a second socket bind a port that nobody listens on if both set SO_REUSEADDR; granian also
        # sets SO_REUSEPORT, which both must do as well.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((HOST, 0))
        port: int = holder.getsockname()[1]
        yield port


def _environment(app_dir: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    # The app must import the very ucm_middleware that the tests import, be it a checkout or an installed wheel.
    spec = find_spec("ucm_middleware")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    merged = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(app_dir), str(package.parent)]),
        "PYTHONUNBUFFERED": "1",
        **changes,
    }
    return {name: value for name, value in merged.items() if value is not None}
