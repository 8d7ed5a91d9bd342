"""A ledger as large as one likes: how long the commands of ``ucm audit`` take over it, and how much memory.

Each command is a process of its own. Its memory must not grow with the ledger.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from benchmarks.ledger import new_rows, user_name
from benchmarks.report import finish, parser, show
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.sqlite import SQLiteLedger
from ucm_middleware.audit.writer import MAX_BATCH
from ucm_middleware.secret import Secret, SecretRing

RESIDENT_MIB: Final = 160.0
"""What a command may take, however many records there are; 64 of it are what verifying keeps of the file."""

SIZES: Final = (100_000, 1_000_000)

_SECRET: Final = "benchmarks.ledger_size: the secret of ledgers that are deleted"
_BUILD: Final = "append all"


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds by the clock and of CPU, and the most MiB that were resident at once."""

    wall_s: float
    cpu_s: float
    resident_mib: float


def build(folder: Path, records: int, users: int, *, sealed: bool) -> None:
    """Write so many records of so many users, in turn."""
    ledger = SQLiteLedger(folder / "ledger", keys=folder / "keys" if sealed else None)
    ledger.start(SecretRing((Secret(_SECRET.encode()),), is_production=False))
    for batch in _batches(records, users):
        for row in batch:
            ledger.append(row)
        ledger.flush()
    ledger.close()


def _batches(records: int, users: int) -> Iterator[list[Row]]:
    for start in range(0, records, MAX_BATCH):
        yield new_rows(min(MAX_BATCH, records - start), users, start)


def run(command: list[str]) -> Run:
    """Run a command that must succeed; what it writes to stdout is thrown away."""
    begun = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "UCM_SECRET": _SECRET})
    _, status, used = os.wait4(process.pid, 0)
    took = perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(took, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def commands(folder: Path, user: str, *, sealed: bool) -> dict[str, list[str]]:
    """What is run over a ledger, by name; in this order, since some need what others made."""
    audit = [str(Path(sys.executable).with_name("ucm")), "audit"]
    ledger, key, checkpoints = (str(folder / name) for name in ("ledger", "key", "checkpoints"))
    keys = ["--keys", str(folder / "keys")] if sealed else []
    return {
        "keygen": [*audit, "keygen", key],
        "verify": [*audit, "verify", ledger],
        "checkpoint": [*audit, "checkpoint", ledger, "--key", key, "--to", checkpoints],
        "verify --checkpoints": [
            *(*audit, "verify", ledger, "--checkpoints", checkpoints, "--public-key", f"{key}.pub"),
        ],
        "show --user": [*audit, "show", ledger, "--user", user, *keys],
        "export": [*audit, "export", ledger, *keys],
    }


def measure(records: int, users: int, *, sealed: bool, folder: Path | None) -> tuple[dict[str, Run], int]:
    """Each command over a new ledger of so many records, and the bytes of its files."""
    with TemporaryDirectory(dir=folder) as own:
        made = [sys.executable, "-m", "benchmarks.ledger_size", "--build", own, "--users", str(users)]
        found = {_BUILD: run([*made, "--records", str(records), *([] if sealed else ["--plain"])])}
        for name, command in commands(Path(own), user_name(users // 2), sealed=sealed).items():
            found[name] = run(command)
        return found, sum(file.stat().st_size for file in Path(own).iterdir())


def missed_limits(found: Mapping[int, Mapping[str, Run]]) -> list[str]:
    """Which commands need too much memory, in words."""
    return [
        f"memory of `{name}` over {records:,} records: {own.resident_mib:.0f} MiB, at most {RESIDENT_MIB:g}"
        for records, runs in found.items()
        for name, own in runs.items()
        if own.resident_mib > RESIDENT_MIB
    ]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--records", type=int, nargs="+", default=list(SIZES), help="of one ledger each; default 100000 1000000"
    )
    options_parser.add_argument("--users", type=int, default=100_000, help="whose they are, in turn; default 100000")
    options_parser.add_argument("--plain", action="store_true", help="without keys; default: sealed")
    options_parser.add_argument("--folder", type=Path, help="for the files, on a real disk; default: a temporary one")
    options_parser.add_argument("--build", type=Path, metavar="FOLDER", help="only write the ledger, in this process")
    options = options_parser.parse_args()
    sealed = not options.plain
    if options.build is not None:
        build(options.build, options.records[0], options.users, sealed=sealed)
        return
    found: dict[int, dict[str, Run]] = {}
    for records in options.records:
        users = min(records, options.users)
        found[records], size = measure(records, users, sealed=sealed, folder=options.folder)
        show(
            f"{records:,} records, {'sealed' if sealed else 'plain'}, of {users:,} users: {size / 2**20:,.0f} MiB",
            ["", "wall, s", "CPU, s", "most resident, MiB"],
            [
                [name, f"{own.wall_s:.1f}", f"{own.cpu_s:.1f}", f"{own.resident_mib:.0f}"]
                for name, own in found[records].items()
            ],
        )
    figures = {str(records): {name: asdict(own) for name, own in runs.items()} for records, runs in found.items()}
    finish(options, {"records": figures}, missed_limits(found))


if __name__ == "__main__":
    main()
