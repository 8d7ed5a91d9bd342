"""A recording of what a Valkey does: all that its MONITOR sees, and whether that is all.

A thread reads what the server writes and looks at none of it before the recording ends: a server that has to wait for
who watches it would be another server.
"""

import socket
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from uuid import uuid4

from .monitor_lines import SCRIPTS, GapError, Line, read_lines
from .processes import HOST
from .valkey import ADMIN, ValkeyServer
from .waiting import PATIENCE

COUNTED = (*SCRIPTS, "hset", "hdel", "pexpire", "spublish")
"""Commands whose number the server also tells by itself, so that a gap shows."""


class Recording:
    """One that runs; `recording` makes it. It ends by itself when the server does."""

    def __init__(self, server: ValkeyServer) -> None:
        self._server = server
        self._counted = True
        self._chunks: list[bytes] = []
        self._socket = socket.create_connection((HOST, server.port), PATIENCE)
        self._socket.sendall(f"AUTH {ADMIN}\r\nMONITOR\r\n".encode())
        self._skip(b"+OK\r\n+OK\r\n")
        self._before = _calls(server)  # from here on it sees each of them
        self._socket.settimeout(None)
        self._end = uuid4().hex.encode()
        self._thread = threading.Thread(target=self._read, name="monitor", daemon=True)
        self._thread.start()

    def server_was_killed(self) -> None:
        """What it did last may have got lost with it: do not count."""
        self._counted = False

    def lines(self) -> list[Line]:
        """All that it saw; the recording is over. Raises GapError if some of it is missing."""
        after: Counter[str] = Counter()
        if self._counted:
            after = _calls(self._server)
            self._server.admin.execute_command("ECHO", self._end)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise GapError("MONITOR did not come to its end")
        raw = b"".join(self._chunks)
        if self._counted:
            end = raw.find(self._end)
            if end < 0:
                raise GapError("the server ended the MONITOR: its buffer ran over, or the server ended")
            raw = raw[: raw.index(b"\r\n", end)]  # others may have gone on meanwhile
        else:
            raw = raw.rpartition(b"\r\n")[0]
        found = list(read_lines(raw.split(b"\r\n"))) if raw else []
        if self._counted:
            seen = Counter(line.command for line in found)
            told = {name: after[name] - self._before[name] for name in COUNTED}
            missed = {name: (told[name], seen[name]) for name in COUNTED if told[name] > seen[name]}
            if missed:
                raise GapError(f"MONITOR missed commands: {missed} (by the server, by MONITOR)")
        return found

    def close(self) -> None:
        # The thread is in a read, which this ends.
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._socket.close()
            return
        self._thread.join(PATIENCE)
        self._socket.close()

    def _skip(self, expected: bytes) -> None:
        got = b""
        while len(got) < len(expected):
            chunk = self._socket.recv(len(expected) - len(got))
            if not chunk:
                raise GapError(f"no MONITOR: {got!r}")
            got += chunk
        if got != expected:
            raise GapError(f"no MONITOR: {got!r}")

    def _read(self) -> None:
        tail = b""
        while True:
            try:
                chunk = self._socket.recv(1 << 18)
            except OSError:
                return
            if not chunk:
                return
            self._chunks.append(chunk)
            tail = tail[-200:] + chunk
            end = tail.find(self._end)
            if end >= 0 and b"\r\n" in tail[end:]:
                return


def _calls(server: ValkeyServer) -> Counter[str]:
    told = server.admin.info("commandstats")
    return Counter({name: told[f"cmdstat_{name}"]["calls"] for name in COUNTED if f"cmdstat_{name}" in told})


@contextmanager
def recording(server: ValkeyServer) -> Generator[Recording]:
    """Record what a server does, inside the block."""
    made = Recording(server)
    try:
        yield made
    finally:
        made.close()
