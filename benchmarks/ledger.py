"""The audit ledger: many writers at once beside spans and beside other ledgers, one alone, and reading.

What is compared runs in turn, round by round, each time into a new file. A record is written when it is durable.
"""

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time, thread_time, time
from typing import Final, Protocol

from benchmarks.other_ledgers import AuditChain, RustPyAudit
from benchmarks.report import finish, parser, show
from benchmarks.spans import Spans, receiver
from benchmarks.timing import percentile
from ucm_middleware.audit.ledger import Ledger
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import FOR_A_CONNECTION, Row
from ucm_middleware.audit.sqlite import SQLiteLedger
from ucm_middleware.audit.verification import verify_ledger
from ucm_middleware.audit.writer import MAX_BATCH
from ucm_middleware.ids import UnifiedIDManager
from ucm_middleware.secret import Secret, SecretRing

# The limits, of 64 writers at once.
SPAN_RATIO: Final = 0.25
"""The CPU of a plain record, in that of a span of the same round."""
PLAIN_RATE: Final = 30_000
SEALED_RATE: Final = 12_000
"""Records a second, plain, and encrypted under the keys of their users."""
LATENCY_MS: Final = 5.0
"""The 99th percentile until a plain record is durable."""
ALONE_MS: Final = 0.8
"""The median of a single writer's plain records."""
TRAIL_MS: Final = 10.0
"""The median of reading one user's trail out of a million records."""
VERIFY_US: Final = 4.0
"""The CPU of verifying a record."""

WRITERS: Final = 64
USERS: Final = 1000
TRAIL_USERS: Final = 10_000
"""How many users' the records are, of those that are written and of those that a trail is looked for among."""
ASKED: Final = 200
"""Of how many users the trail is read."""

SPANS: Final = "OpenTelemetry spans"
PLAIN: Final = "ledger, plain"
SEALED: Final = "ledger, sealed"
ALONE: Final = "ledger, plain, 1 writer"
AUDITCHAIN: Final = "auditchain"
RUST_PY_AUDIT: Final = "rust-py-audit"

Write = Callable[[Row], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds of CPU for each record, records a second, and milliseconds until one is written."""

    cpu_us: float
    rate: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Milliseconds of one user's trail, the median, and microseconds of CPU to verify a record."""

    trail_ms: float
    verify_us: float


class Contender(Protocol):
    """Something that records are written to."""

    async def write(self, row: Row) -> None:
        """Write one; durable on return, where it ever is."""
        ...

    def finish(self) -> None:
        """What belongs to the writing and is left to do after the last one."""
        ...

    def close(self, written: Sequence[Row]) -> None: ...


Make = Callable[[Path, int], Contender]
"""Makes one in a folder, for so many records."""


def new_rows(number: int, users: int = USERS, start: int = 0) -> list[Row]:
    """The openings of so many contexts, each in a span of its own, of users in turn from the one at ``start`` on."""
    new_core = UnifiedIDManager().generate_core
    chance = random.Random(3)
    rows: list[Row] = []
    for at in range(start, start + number):
        core, trace_id, span_id = new_core(), chance.getrandbits(128), chance.getrandbits(64)
        user, ids = user_name(at % users), (new_core(), trace_id, span_id)
        rows.append(("opened", time(), user, None, core, core, None, None, "ok", None, None, FOR_A_CONNECTION, *ids))
    return rows


def open_ledger(folder: Path, *, sealed: bool) -> SQLiteLedger:
    """A new ledger, its thread running."""
    ledger = SQLiteLedger(folder / "ledger", keys=folder / "keys" if sealed else None)
    ledger.start(SecretRing((Secret(random.randbytes(32)),), is_production=False))
    return ledger


class Own:
    """The ledger. Its first record, which opens the file in its thread, is not measured."""

    def __init__(self, folder: Path, *, sealed: bool) -> None:
        self.ledger = open_ledger(folder, sealed=sealed)
        self.ledger.append(new_rows(1)[0])
        self.ledger.flush()

    async def write(self, row: Row) -> None:
        self.ledger.append(row)
        await self.ledger.durable()

    def finish(self) -> None: ...

    def close(self, written: Sequence[Row]) -> None:
        self.ledger.close()


def measure(contender: Contender, rows: Sequence[Row], writers: int) -> Figures:
    """Write the records, shared out among so many tasks."""
    took: list[float] = []

    async def writer(mine: Sequence[Row]) -> None:
        for row in mine:
            begun = perf_counter()
            await contender.write(row)
            took.append(perf_counter() - begun)

    async def all_writers() -> None:
        await asyncio.gather(*(writer(rows[at::writers]) for at in range(writers)))

    wall, cpu = perf_counter(), process_time()
    asyncio.run(all_writers())
    contender.finish()
    wall, cpu = perf_counter() - wall, process_time() - cpu
    contender.close(rows)
    number = len(rows)
    return Figures(cpu / number * 1e6, number / wall, percentile(took, 50) * 1e3, percentile(took, 99) * 1e3)


def take_turns(
    contenders: Mapping[str, tuple[Make, int, int]], rounds: int, folder: Path | None
) -> dict[str, list[Figures]]:
    """Measure each in every round; with it stands the number of its records, and of its writers."""
    rows = new_rows(max(number for _, number, _ in contenders.values()))
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (make, number, writers) in contenders.items():
            with TemporaryDirectory(dir=folder) as own:
                found[name].append(measure(make(Path(own), number), rows[:number], writers))
    return found


def median(runs: Sequence[Figures]) -> Figures:
    """Each figure's own median."""
    columns = zip(*((run.cpu_us, run.rate, run.p50_ms, run.p99_ms) for run in runs), strict=True)
    return Figures(*map(statistics.median, columns))


def span_ratios(found: Mapping[str, Sequence[Figures]]) -> list[float]:
    """The CPU of a plain record in that of a span, for each round."""
    return [plain.cpu_us / span.cpu_us for plain, span in zip(found[PLAIN], found[SPANS], strict=True)]


def measure_reading(records: int, *, sealed: bool, folder: Path | None) -> Reading:
    """Read trails of random users out of so many records, and verify them all."""
    with TemporaryDirectory(dir=folder) as own:
        ledger = open_ledger(Path(own), sealed=sealed)
        for at, row in enumerate(new_rows(records, TRAIL_USERS)):
            if at % MAX_BATCH == 0:
                ledger.flush()
            ledger.append(row)
        ledger.flush()
        trails: list[float] = []
        for number in random.Random(3).sample(range(min(records, TRAIL_USERS)), min(records, ASKED)):
            begun = perf_counter()
            trail = ledger.trail(user_name(number))
            trails.append(perf_counter() - begun)
            assert trail is not None
        ledger.close()
        begun = process_time()
        verification = verify_ledger(ledger.path)
        took = process_time() - begun
        assert not verification.problems
    return Reading(statistics.median(trails) * 1e3, took / records * 1e6)


def measure_appends(rounds: int, folder: Path | None) -> dict[str, float]:
    """Microseconds of its own CPU that a thread spends on a record it appends and does not wait for, the medians."""
    rows = new_rows(MAX_BATCH)

    def append(ledger: Ledger) -> float:
        begun = thread_time()
        for row in rows:
            ledger.append(row)
        return (thread_time() - begun) / len(rows) * 1e6

    memory = MemoryLedger()
    with TemporaryDirectory(dir=folder) as own:
        durable = open_ledger(Path(own), sealed=False)
        took: dict[str, list[float]] = {"MemoryLedger": [], "SQLiteLedger": []}
        for _ in range(rounds):
            took["MemoryLedger"].append(append(memory))
            took["SQLiteLedger"].append(append(durable))
            durable.flush()
        durable.close()
    return {name: statistics.median(values) for name, values in took.items()}


def user_name(number: int) -> str:
    """How the users are called, from 0 on."""
    return f"user-{number:06}"


def missed_limits(found: Mapping[str, Sequence[Figures]], readings: Mapping[str, Reading]) -> list[str]:
    """Which limits are missed, in words."""
    plain, sealed, alone = (median(found[name]) for name in (PLAIN, SEALED, ALONE))
    most = [
        ("CPU of a plain record", statistics.median(span_ratios(found)), SPAN_RATIO, "x a span"),
        ("p99 of a plain record", plain.p99_ms, LATENCY_MS, " ms"),
        ("a plain record alone", alone.p50_ms, ALONE_MS, " ms"),
        *((f"the trail of a user, {name}", own.trail_ms, TRAIL_MS, " ms") for name, own in readings.items()),
        *((f"verifying a record, {name}", own.verify_us, VERIFY_US, " us") for name, own in readings.items()),
    ]
    least = [("plain records", plain.rate, PLAIN_RATE), ("sealed records", sealed.rate, SEALED_RATE)]
    return [
        *(f"{what}: {it:.2f}{unit}, at most {limit:g}" for what, it, limit, unit in most if it > limit),
        *(f"{what}: {it:,.0f} a second, at least {limit:,}" for what, it, limit in least if it < limit),
    ]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=7)
    options_parser.add_argument("--records", type=int, default=30_000, help="plain ones in a round; default 30000")
    options_parser.add_argument("--kept", type=int, default=1_000_000, help="in a ledger that is read and verified")
    options_parser.add_argument("--folder", type=Path, help="for the files, on a real disk; default: a temporary one")
    options = options_parser.parse_args()
    number: int = options.records
    few = max(WRITERS, number // 30)
    with ExitStack() as stack:
        url = stack.enter_context(receiver())
        contenders: dict[str, tuple[Make, int, int]] = {
            SPANS: (lambda _, capacity: Spans(url, capacity), max(WRITERS, number // 3), WRITERS),
            PLAIN: (lambda folder, _: Own(folder, sealed=False), number, WRITERS),
            SEALED: (lambda folder, _: Own(folder, sealed=True), max(WRITERS, number // 2), WRITERS),
            ALONE: (lambda folder, _: Own(folder, sealed=False), few, 1),
        }
        if find_spec("auditchain") is not None:
            contenders[AUDITCHAIN] = (lambda folder, _: AuditChain(folder), few, WRITERS)
        if find_spec("rust_py_audit") is not None:
            contenders[RUST_PY_AUDIT] = (lambda folder, _: RustPyAudit(folder), few, WRITERS)
        found = take_turns(contenders, options.rounds, options.folder)
    ratios = span_ratios(found)
    appends = measure_appends(4 * options.rounds, options.folder)
    readings = {
        name: measure_reading(options.kept, sealed=sealed, folder=options.folder)
        for name, sealed in (("plain", False), ("sealed", True))
    }
    medians = {name: median(runs) for name, runs in found.items()}
    show(
        f"{WRITERS} writers at once, durable records (medians; lowest to highest of {options.rounds} rounds)",
        ["", "CPU, us", "", "a second", "", "p50, ms", "p99, ms", ""],
        [
            [
                name,
                f"{own.cpu_us:.1f}",
                _range([run.cpu_us for run in found[name]], ".1f"),
                f"{own.rate:,.0f}",
                _range([run.rate for run in found[name]], ",.0f"),
                f"{own.p50_ms:.2f}",
                f"{own.p99_ms:.2f}",
                _range([run.p99_ms for run in found[name]], ".2f"),
            ]
            for name, own in medians.items()
        ],
    )
    print(f"A plain record takes {statistics.median(ratios):.3f} of the CPU of a span ({_range(ratios, '.3f')}).")
    show(
        "What the appending thread spends on a record",
        ["", "CPU, us"],
        [[name, f"{took:.2f}"] for name, took in appends.items()],
    )
    show(
        f"Reading a ledger of {options.kept:,} records of {TRAIL_USERS:,} users",
        ["", "the trail of one user, ms", "verifying a record, us"],
        [[name, f"{own.trail_ms:.2f}", f"{own.verify_us:.2f}"] for name, own in readings.items()],
    )
    figures = {
        "rows": {name: asdict(own) for name, own in medians.items()},
        "rounds": {name: [asdict(run) for run in runs] for name, runs in found.items()},
        "span_ratios": ratios,
        "append_us": appends,
        "reading": {name: asdict(own) for name, own in readings.items()},
    }
    finish(options, figures, missed_limits(found, readings))


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


if __name__ == "__main__":
    main()
