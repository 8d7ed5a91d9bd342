"""The application on a real server, a process of its own, with what it writes and what the witness in it tells."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ucm_middleware.certify.witness.wire import SOCKET, Order, Told
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.testing.server import HOST, ServerKind, environment_of, held_port

_SUBJECT: Final = "ucm_middleware.certify.witness.subject"

STARTING: Final = 30.0
"""Seconds until a server that neither ends nor listens is given up."""

ENDING: Final = 5.0
"""Seconds until a server that was told to end is killed."""

_TAIL: Final = 40
"""Lines of what a server wrote that are kept."""

_LONGEST_LINE: Final = 64 * 1024

_LAST_OUTPUT: Final = 1.0
"""Seconds for the rest of the output to be read, once the server has ended."""

SERVERS: Final[tuple[ServerKind, ...]] = ("uvicorn", "hypercorn", "granian")
SPEAK_HTTP2: Final[frozenset[ServerKind]] = frozenset({"hypercorn", "granian"})


class SubjectError(ConfigurationError):
    """The application could not be tried. ``output`` is the end of what the server wrote, and ``given`` are credentials
    that users had been given, which may stand in it.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output
        self.given = frozenset[str]()


@dataclass(frozen=True, slots=True)
class Subject:
    """What is run, and where: ``app`` is "module:name", looked for in ``app_dir``. ``database`` names the variable of
    the environment in which it finds its PostgreSQL.
    """

    order: Order
    kind: ServerKind
    app_dir: Path
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    database: str | None = None


class Process:
    """One running server; ``start`` makes them."""

    def __init__(self, port: int, process: asyncio.subprocess.Process) -> None:
        self.port = port
        self.size = 0
        self._process = process
        self._tail: deque[str] = deque(maxlen=_TAIL)

    @property
    def output(self) -> str:
        """The end of what it wrote."""
        return "\n".join(self._tail)

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def read_output(self) -> None:
        """Until it ends. A server whose output nobody reads would stand still."""
        assert self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(_LONGEST_LINE):
            self.size += len(data)
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._tail.append(line[:500].decode(errors="replace"))

    async def wait_until_up(self) -> None:
        """Raises SubjectError when it ends before, or does not listen in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + STARTING
        while loop.time() < until:
            if self.returncode is not None:
                await asyncio.sleep(0.05)  # for what it wrote last
                raise SubjectError(f"the application does not start: {self._last()}", self.output)
            with suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, self.port)
                writer.close()
                return
            await asyncio.sleep(0.02)
        raise SubjectError(
            f"the application does not start: it neither listens nor ends within {STARTING:g} seconds", self.output
        )

    def _last(self) -> str:
        said = next((line for line in reversed(self._tail) if line.strip()), "it wrote nothing")
        return f"it ended with exit status {self.returncode}, and wrote last: {said.strip()}"

    async def end(self) -> None:
        """Tell it to end, and wait; kill it when it does not."""
        if self.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), ENDING)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    async def wait(self) -> None:
        """Until it has ended."""
        await self._process.wait()

    def let_go(self) -> None:
        """Close our end of its output, once it has ended; asyncio does so only when the last writer has."""
        transport: asyncio.SubprocessTransport = vars(self._process)["_transport"]
        transport.close()

    def kill(self) -> None:
        """At once, its worker included: it leads a process group of its own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@asynccontextmanager
async def start(subject: Subject, hear: Callable[[Told], None]) -> AsyncGenerator[Process]:
    """Run it, up and listening inside the block. ``hear`` is given what the witness tells.

    Raises ConfigurationError for a server that is not installed, SubjectError for an application that does not start.
    """
    if find_spec(subject.kind) is None:
        raise ConfigurationError(f"{subject.kind} is not installed: pip install {subject.kind}")
    async with _listening(subject.order, hear) as where:
        with held_port() as port:
            process = Process(port, await _started(subject, port, where))
            reading = asyncio.create_task(process.read_output())
            try:
                await process.wait_until_up()
                yield process
                await process.end()
            finally:
                process.kill()
                await process.wait()
                await _ended(reading)
                process.let_go()


async def _ended(reading: asyncio.Task[None]) -> None:
    """Read what is left. A process that the application has detached may hold its output open for ever."""
    await asyncio.wait([reading], timeout=_LAST_OUTPUT)
    reading.cancel()
    await asyncio.wait([reading])


async def _started(subject: Subject, port: int, where: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *_command(subject.kind, port),
        cwd=subject.app_dir,
        env=environment_of(subject.app_dir, {**subject.env, SOCKET: where}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


def _command(kind: ServerKind, port: int) -> list[str]:
    match kind:
        case "uvicorn":
            # asyncio's event loop: what it does to variables, cpython#140947, is part of what is tried.
            where = ["--host", HOST, "--port", str(port), "--loop", "asyncio"]
            return ["uvicorn", *where, "--no-access-log", "--factory", f"{_SUBJECT}:subject"]
        case "hypercorn":
            # No worker processes: it serves in the process that is started.
            where = ["--bind", f"{HOST}:{port}", "--workers", "0", "--worker-class", "asyncio"]
            return ["hypercorn", *where, f"{_SUBJECT}:subject()"]
        case "granian":
            where = ["--host", HOST, "--port", str(port), "--workers", "1", "--loop", "asyncio"]
            return ["granian", "--interface", "asgi", *where, "--factory", f"{_SUBJECT}:subject"]


@asynccontextmanager
async def _listening(order: Order, hear: Callable[[Told], None]) -> AsyncGenerator[str]:
    """Listen for witnesses, which are told what to do."""
    first = json.dumps(order.to_json()).encode() + b"\n"
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        writer.write(first)
        try:
            # Cancelled is what a run that is broken off leaves, and asyncio would write a traceback for each.
            with suppress(OSError, asyncio.CancelledError):
                # What is killed in the middle of a line leaves a part of one.
                while (line := await reader.readline()).endswith(b"\n"):
                    hear(Told.of_json(json.loads(line)))
        finally:
            writers.discard(writer)
            writer.close()

    with tempfile.TemporaryDirectory(prefix="ucm-certify-") as folder:
        where = str(Path(folder, "witness"))
        server = await asyncio.start_unix_server(serve, where, limit=64 * 1024 * 1024)
        try:
            yield where
        finally:
            server.close()
            for writer in [*writers]:
                writer.close()
            await server.wait_closed()
