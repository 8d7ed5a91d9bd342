"""Programs that tests start and that refuse to run as root: each on a free port of the loopback interface."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .waiting import PATIENCE, wait_until

HOST = "127.0.0.1"

UNPRIVILEGED = "nobody" if os.geteuid() == 0 else None
"""Whom programs run as that refuse root; None for whoever runs the tests."""


@contextmanager
def held_port() -> Generator[int]:
    """A port that the kernel hands to nobody else: bound here, and never listened on.

    Linux lets a program bind it too that sets SO_REUSEADDR, as PostgreSQL and PgBouncer do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        port: int = holder.getsockname()[1]
        yield port


@contextmanager
def unprivileged_folder(prefix: str) -> Generator[Path]:
    """A temporary folder that belongs to whom `run_program` runs programs as."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        if UNPRIVILEGED is not None:
            shutil.chown(folder, UNPRIVILEGED)
        yield Path(folder)


def run_program(command: Sequence[str | Path], folder: Path) -> None:
    """Run a program to its end. Raises AssertionError with its output if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=UNPRIVILEGED,
        extra_groups=None if UNPRIVILEGED is None else [],
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}:\n{done.stdout.decode(errors='replace')}")


class Program:
    """A server that runs; `start_program` makes it."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes], log: int) -> None:
        self.name = name
        self.port = port
        self._process = process
        self._log = log

    @property
    def output(self) -> str:
        """All that it has written to stdout and stderr so far."""
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")

    def wait_until_up(self) -> None:
        """Wait for the first connection that it accepts. Raises AssertionError with its output if it ends before."""

        def accepts() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self._process.returncode}:\n{self.output}")
            with socket.socket() as probe:
                return probe.connect_ex((HOST, self.port)) == 0

        wait_until(accepts, f"{self.name} accepts connections")

    def stop(self, sig: signal.Signals) -> None:
        """End it: by `sig`, and if that does not help, with all of its children by SIGKILL."""
        self._process.send_signal(sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def start_program(
    name: str, port: int, command: Sequence[str | Path], folder: Path, *, stop_by: signal.Signals
) -> Generator[Program]:
    """Run a server in `folder`, up and listening on `port` inside the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            user=UNPRIVILEGED,
            extra_groups=None if UNPRIVILEGED is None else [],
            start_new_session=True,
        )
        program = Program(name, port, process, log.fileno())
        try:
            program.wait_until_up()
            yield program
        finally:
            program.stop(stop_by)


def _environment() -> dict[str, str]:
    # Nothing of ours: PGPORT or LC_ALL would change what the server is.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
