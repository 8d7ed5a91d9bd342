"""Sees all that a store does, over its restarts, and judges it at the end."""

import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from ucm_valkey.cluster import scripts

from .fleet import LIMIT, PREFIX
from .history import History, replay
from .monitor import Recording, recording
from .monitor_lines import Line
from .restarts import Restarts
from .valkey import ValkeyServer
from .waiting import wait_until

KINDS = {scripts.ACQUIRE.sha: "acquire", scripts.RESTORE.sha: "restore"}


class Witness:
    """One that looks; `witnessing` makes it."""

    def __init__(self, store: Restarts, stack: ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._before: list[Recording] = []
        self._now = self._record()

    def kill(self) -> None:
        """Kill the store. What it did last may be missing."""
        self._now.server_was_killed()
        self._store.kill()
        self._before.append(self._now)  # read at the end: that takes a while, in which the store would be away

    def restart(self) -> None:
        """Start it again, empty."""
        self._store.start()
        self._now = self._record()

    def lines(self) -> list[Line]:
        """What the server that runs has done, to the end; the recording is over."""
        return self._now.lines()

    def history(self, limit: int = LIMIT) -> History:
        """All that was, checked: raises AssertionError for what was wrong, GapError where something is missing."""
        servers = [*(each.lines() for each in self._before), self.lines()]
        history = replay(servers, prefix=PREFIX, limit=limit, scripts=KINDS, until=time.time())
        history.check()
        return history

    def _record(self) -> Recording:
        return self._stack.enter_context(recording(self._store.server))


@contextmanager
def witnessing(store: Restarts) -> Generator[Witness]:
    """A witness of all that a store does inside the block."""
    with ExitStack() as stack:
        yield Witness(store, stack)


def wall_minus_monotonic() -> float:
    """What to add to the machine's monotonic clock to have the store's."""
    # The monotonic clock is read second: whoever lacks the processor in between gets too little, and never too much.
    return max(time.time() - time.monotonic() for _ in range(10))


def leases_in(server: ValkeyServer) -> list[str]:
    """What stands in a store, and counts."""
    found: list[str] = []
    for key in server.admin.scan_iter(f"{PREFIX}{{*}}:u:*", count=1000):
        bucket = key.decode().partition("}:u:")[0]
        for field in server.admin.hkeys(key):
            name = field.decode()
            if name.startswith("l:") and server.admin.exists(f"{bucket}}}:t:{name[2:].rpartition('.')[0]}"):
                found.append(name)
    return found


def wait_until_free(server: ValkeyServer) -> None:
    """Wait until nothing is held any more."""
    wait_until(lambda: not leases_in(server), "every slot is free")
