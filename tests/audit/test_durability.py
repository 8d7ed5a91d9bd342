"""What is acknowledged was synced before: shown on the system calls of a real process, and by losses of power.

A loss of power keeps what was synced. Of what was written since, any part may be there, in whole or torn.
"""

import random
import secrets
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.ledger_check import LedgerCheck, each_once
from support.syscalls import Event, Names, Said, Sync, Truncate, Write, traced
from ucm_middleware.audit import AuditRecord, SQLiteLedger
from ucm_middleware.audit.file import LedgerFile
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing

SECTOR = 512
LOSSES = 40
ALONE, TASKS, EACH = 24, 8, 8

SCRIPT = f"""
import asyncio, os, sys
from pathlib import Path
from ucm_middleware.audit import AuditRecord, SQLiteLedger, file
from ucm_middleware.audit.file import LedgerFile
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing

file.LOG = 40  # pages: checkpoints come often
folder, secret, keys = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
print("ready", flush=True)
sys.stdin.readline()
ledger = SQLiteLedger(folder / "audit.db", keys=folder / "keys.db" if keys else None)
ledger.start(SecretRing.from_settings(secret, None, IsolatedEnvironment(environ={{}})))

async def write(number):
    ledger.append(AuditRecord("opened", 1000.0, f"user-{{number % 50}}", record_id=number))
    await ledger.durable()
    os.write(1, b"%d\\n" % number)

async def several(numbers):
    for number in numbers:
        await write(number)

async def main():
    await several(range({ALONE}))
    os.write(1, b"together\\n")
    await asyncio.gather(*(several(range(first, first + {EACH})) for first in range(100, 100 * {TASKS + 1}, 100)))

asyncio.run(main())
"""


@dataclass(frozen=True)
class Run:
    """A process that wrote to a ledger and acknowledged each record, and all that it asked of the kernel meanwhile."""

    events: list[Event]
    is_sealed: bool
    secret: str

    def acknowledged(self, end: int) -> set[int]:
        return {int(event.text) for event in self.events[:end] if isinstance(event, Said) and event.text.isdigit()}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sealed"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    is_sealed: bool = request.param
    folder = tmp_path_factory.mktemp("traced")
    secret = secrets.token_urlsafe(32)
    command = [sys.executable, "-P", "-c", SCRIPT, str(folder), secret, *(["keys"] if is_sealed else [])]
    return Run(traced(folder, command), is_sealed, secret)


class Disk:
    """What is on a disk after some events, and what is only on its way there."""

    def __init__(self, events: list[Event]) -> None:
        self.names: dict[str, int] = {}
        self.durable_names: dict[str, int] = {}
        self._durable: dict[int, bytearray] = {}
        self._pending: dict[int, list[tuple[int, Write | Truncate]]] = {}
        self._names: list[tuple[int, Names]] = []
        for at, event in enumerate(events):
            if isinstance(event, Write | Truncate):
                self._pending.setdefault(event.file, []).append((at, event))
            elif isinstance(event, Names):
                self.names = event.files
                self._names.append((at, event))
            elif isinstance(event, Sync):
                self._sync(event)

    @property
    def unsynced(self) -> set[str]:
        """The files of which something is on its way."""
        return {name for name, file in self.names.items() if self._pending.get(file)} | (
            self.names.keys() - self.durable_names.keys()
        )

    def stop(self, folder: Path) -> None:
        """Put into the folder what is there after the process alone has ended: all that it has written."""
        for name, file in self.names.items():
            content = bytearray(self._durable.get(file, b""))
            for _, event in self._pending.get(file, ()):
                _apply(content, event)
            folder.joinpath(name).write_bytes(content)

    def lose_power(self, folder: Path, chance: random.Random, likelihood: float) -> None:
        """Put into the folder what is found afterwards."""
        names = self.durable_names if chance.random() < 0.5 else self.names
        for name, file in names.items():
            content = bytearray(self._durable.get(file, b""))
            for _, event in self._pending.get(file, ()):
                if chance.random() < likelihood:
                    _apply(content, _torn(event, chance))
            folder.joinpath(name).write_bytes(content)

    def _sync(self, event: Sync) -> None:
        waiting = self._pending.pop(event.file, [])
        content = self._durable.setdefault(event.file, bytearray())
        for at, change in waiting:
            if at < event.begun:
                _apply(content, change)
        if left := [(at, change) for at, change in waiting if at >= event.begun]:
            self._pending[event.file] = left
        before = [names for at, names in self._names if at < event.begun]
        if before and before[-1].folder == event.file:
            self.durable_names = before[-1].files


def _apply(content: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        content[:] = content[: change.size].ljust(change.size, b"\0")
    else:
        if len(content) < change.offset:
            content.extend(bytes(change.offset - len(content)))
        content[change.offset : change.offset + len(change.data)] = change.data


def _torn(change: Write | Truncate, chance: random.Random) -> Write | Truncate:
    if isinstance(change, Truncate) or chance.random() < 0.5:
        return change
    sectors = len(change.data) // SECTOR
    return Write(change.file, change.offset, change.data[: SECTOR * chance.randint(0, sectors)])


def test_alone_nothing_is_unsynced_when_it_is_acknowledged(run: Run) -> None:
    ends = [end for end, event in enumerate(run.events) if isinstance(event, Said) and event.text.isdigit()]
    assert len(ends) == ALONE + TASKS * EACH
    for end in ends[:ALONE]:
        assert Disk(run.events[:end]).unsynced == set(), f"when {run.events[end]} is said"


def test_the_run_has_what_makes_it_hard(run: Run) -> None:
    """Checkpoints, and records that wait for one sync together."""
    names = next(event.files for event in reversed(run.events) if isinstance(event, Names))
    written = [event.file for event in run.events if isinstance(event, Write)]
    assert written.count(names["audit.db"]) > 10
    first = next(at for at, event in enumerate(run.events) if event == Said("together"))
    syncs = [event for event in run.events[first:] if isinstance(event, Sync) and event.file == names["audit.db-wal"]]
    assert len(syncs) < TASKS * EACH


def test_a_process_that_ended_in_a_checkpoint_leaves_a_ledger_that_goes_on(run: Run, tmp_path: Path) -> None:
    ledger_file = next(event.files["audit.db"] for event in reversed(run.events) if isinstance(event, Names))
    first = next(at for at, event in enumerate(run.events) if event == Said("0"))
    ends = [
        end for end, event in enumerate(run.events, 1)
        if end > first and isinstance(event, Write) and event.file == ledger_file
    ]  # fmt: skip
    for end in ends[:60]:
        folder = tmp_path / str(end)
        folder.mkdir()
        Disk(run.events[:end]).stop(folder)
        with closing(LedgerFile.open(folder / "audit.db", sealed=run.is_sealed)) as file:
            assert file.size >= len(run.acknowledged(end))


def test_no_loss_of_power_takes_what_was_acknowledged(run: Run, tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    first = next(at for at, event in enumerate(run.events) if event == Said("0"))
    for number in range(LOSSES):
        end = chance.randint(first + 1, len(run.events))
        folder = tmp_path / str(number)
        folder.mkdir()
        Disk(run.events[:end]).lose_power(folder, chance, chance.choice((0.0, 0.5, 0.9, 1.0)))
        keys = folder / "keys.db" if run.is_sealed else None
        with closing(SQLiteLedger(folder / "audit.db", keys=keys)) as ledger:
            ledger.start(SecretRing.from_settings(run.secret, None, IsolatedEnvironment(environ={})))
            ledger.append(AuditRecord("opened", 2000.0, "afterwards", record_id=5000))
            ledger.flush()
        records = LedgerCheck(folder / "audit.db", keys, run.secret).read()
        found = {int(record_id, 16) for record_id in each_once(records)}
        assert run.acknowledged(end) | {5000} <= found, f"seed {seed}, loss {number}, after {end} events"
