"""What a process really asks of the kernel: its writes to the files of a folder, its syncs, and what it says, in order.

``traced(folder, command)`` runs the command under ptrace, in a process of its own, since a tracer waits for every child
that it has. Linux on x86-64 and arm64; elsewhere it fails.
"""

import ctypes
import os
import pickle
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

READY: Final = b"ready\n"
"""What the command says when it is to be traced, and then waits for a line."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that a file got."""

    file: int
    """The number of its inode, here and below."""
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file got another length."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync of a file or of the folder is through, which makes durable what was before the event ``begun``."""

    file: int
    begun: int


@dataclass(frozen=True, slots=True)
class Names:
    """The files in the folder, which is a file too, are now these."""

    folder: int
    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class Said:
    """A line on stdout, just before it goes out."""

    text: str


Event = Write | Truncate | Sync | Names | Said


def traced(folder: Path, command: Sequence[str], *, timeout: float = 60) -> list[Event]:
    """Run it from when it has said READY to its end, which must be a good one."""
    done = subprocess.run(
        [sys.executable, "-m", "support.syscalls", str(folder), *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        stdout=subprocess.PIPE,
        timeout=timeout,
        check=True,
    )
    events: list[Event] = pickle.loads(done.stdout)
    return events


_SEIZE, _INTERRUPT, _SYSCALL, _GET_SYSCALL_INFO = 0x4206, 0x4207, 24, 0x420E
_FORKS_CLONES_SYSGOOD_EXITKILL = 0x2 | 0x4 | 0x8 | 0x1 | 0x100000
_WALL = 0x40000000
_ENTRY, _EXIT = 1, 2

_NUMBERS: Final = {
    "x86_64": {1: "write", 18: "pwrite", 74: "sync", 75: "sync", 77: "truncate"},
    "aarch64": {64: "write", 68: "pwrite", 82: "sync", 83: "sync", 46: "truncate"},
}


class _SyscallInfo(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),  # of the result, after an exit
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Tracer:
    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.events: list[Event] = []
        self._folder = folder.resolve()
        self._process = process
        self._names: dict[str, int] = {}
        self._syncing: dict[int, Sync] = {}
        self._calls = _NUMBERS[platform.machine()]
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._libc.ptrace.restype = ctypes.c_long

    def run(self) -> int:
        """Returns the exit status."""
        self._ptrace(_SEIZE, self._process.pid, 0, _FORKS_CLONES_SYSGOOD_EXITKILL)
        self._ptrace(_INTERRUPT, self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._stopped(thread, os.WSTOPSIG(status), status >> 16)
            elif thread == self._process.pid:
                return os.waitstatus_to_exitcode(status)

    def _stopped(self, thread: int, sig: int, event: int) -> None:
        if sig == signal.SIGTRAP | 0x80:
            self._syscall(thread)
            sig = 0
        elif event:
            sig = 0
        self._ptrace(_SYSCALL, thread, 0, sig)

    def _syscall(self, thread: int) -> None:
        info = _SyscallInfo()
        self._ptrace(_GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY and (call := self._calls.get(info.number)) is not None:
            self._entered(thread, call, *info.arguments[:4])
        elif info.op == _EXIT and (sync := self._syncing.pop(thread, None)) is not None and info.number == 0:
            self.events.append(sync)

    def _entered(self, thread: int, call: str, descriptor: int, second: int, third: int, fourth: int) -> None:
        if call == "write" and descriptor == 1:
            self.events.extend(Said(line) for line in _memory(thread, second, third).decode().splitlines())
            return
        link = f"/proc/{thread}/fd/{descriptor}"
        path = Path(os.readlink(link))
        if not path.is_relative_to(self._folder) or path.name.endswith("-shm"):
            return
        self._note_names()
        file = os.stat(link).st_ino
        if call == "sync":
            self._syncing[thread] = Sync(file, len(self.events))
        elif call == "truncate":
            self.events.append(Truncate(file, second))
        else:
            assert call == "pwrite", f"{path} is written to by other means"
            self.events.append(Write(file, fourth, _memory(thread, second, third)))

    def _note_names(self) -> None:
        names = {entry.name: entry.inode() for entry in os.scandir(self._folder) if entry.is_file()}
        if names != self._names:
            self._names = names
            self.events.append(Names(self._folder.stat().st_ino, names))

    def _ptrace(self, request: int, thread: int, address: int = 0, data: int = 0) -> None:
        if self._libc.ptrace(request, thread, address, data) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def _memory(thread: int, address: int, length: int) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def main() -> None:
    """``python -m support.syscalls FOLDER COMMAND...``: writes the events to stdout, pickled."""
    folder, *command = sys.argv[1:]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == READY
    tracer = _Tracer(Path(folder), process)
    status = tracer.run()
    sys.stdout.buffer.write(pickle.dumps(tracer.events))
    sys.exit(status)


if __name__ == "__main__":
    # As a module of its own name, so that what is pickled is found again.
    from support.syscalls import main as run

    run()
