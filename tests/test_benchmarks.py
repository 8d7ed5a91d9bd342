"""The benchmarks run, tell what they measured, and hold what they find against their limits. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucm_middleware import UserExecutionContext

ROOT = Path(__file__).parents[1]


def run(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, from the root. ``path`` replaces where programs are looked for."""
    environment = os.environ if path is None else {**os.environ, "PATH": str(path)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def figures(benchmark: str, *options: str, folder: Path, programs: Path | None = None) -> dict[str, Any]:
    """What a benchmark that succeeded wrote down."""
    file = folder / "figures.json"
    done = run("-m", f"benchmarks.{benchmark}", "--json", str(file), *options, path=programs)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def program(folder: Path, name: str, code: str) -> None:
    """A program of that name, for tests that must not depend on the real one."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)


VALGRIND = """
import sys

output = next(argument.split("=")[1] for argument in sys.argv if argument.startswith("--callgrind-out-file="))
row, operations = sys.argv[sys.argv.index("--run") + 1], int(sys.argv[sys.argv.index("--operations") + 1])
http, json, silent, talking = {
    "bare": (100, 1000, 200, 700),
    "floor": (110, 1010, 210, 710),
    "firewall": (120, 1020, 220, 720),
    "as it comes": (150, 1050, 250, 750),
    "everything on": (EVERYTHING),
}[row]
for at, count in enumerate((http, json, silent, talking)):
    with open(f"{output}.{2 * at + 2}", "w") as dump:
        dump.write(f"version: 1\\ntotals: {count * operations}\\n")
"""

WRK = """
import sys, urllib.request

assert urllib.request.urlopen(sys.argv[-1]).read() == b'{"id":7,"name":"benchmark","ok":true}'
print("Requests/sec:   50.00")
"""

TASKSET = "import os, sys\nos.execvp(sys.argv[3], sys.argv[3:])\n"


class TestCost:
    @pytest.mark.parametrize("row", ["bare", "floor", "firewall", "as it comes", "everything on"])
    def test_a_row_runs(self, row: str) -> None:
        done = run("-m", "benchmarks.cost", "--run", row, "--operations", "2")
        assert done.returncode == 0, done.stderr

    def test_the_counts_are_held_against_the_floor_and_the_bare_app(self, tmp_path: Path) -> None:
        program(tmp_path, "valgrind", VALGRIND.replace("EVERYTHING", "190, 1400, 290, 790"))
        rows = figures("cost", "--operations", "3", "--gate", folder=tmp_path, programs=tmp_path)["rows"]

        everything = rows["everything on"]
        assert everything["instructions"] == {"http": 190, "json": 1400, "websocket": 290, "message": 50}
        assert (everything["http_added"], everything["http_floors"]) == (90, 9)
        assert (everything["websocket_added"], everything["websocket_floors"]) == (90, 9)
        assert (everything["message_added"], everything["message_ratio"]) == (0, 1)
        assert everything["json_ratio"] == 1.4
        assert rows["as it comes"]["http_floors"] == 5

    @pytest.mark.parametrize(
        ("counts", "what"),
        [
            ("191, 1400, 290, 790", "HTTP request: 9.10x the floor"),
            ("190, 1401, 290, 790", "Starlette JSON endpoint: 1.40x bare"),
            ("190, 1400, 291, 791", "WebSocket connection: 9.10x the floor"),
            ("190, 1400, 290, 800", "WebSocket message: 1.02x bare"),
        ],
    )
    def test_the_gate_names_each_limit_that_is_missed(self, counts: str, what: str, tmp_path: Path) -> None:
        program(tmp_path, "valgrind", VALGRIND.replace("EVERYTHING", counts))
        done = run("-m", "benchmarks.cost", "--gate", path=tmp_path)

        missed = [line for line in done.stdout.splitlines() if line.startswith("misses its limit")]
        assert done.returncode == 1
        assert [what in line for line in missed] == [True]

    def test_a_row_that_fails_is_named_with_what_it_said(self, tmp_path: Path) -> None:
        program(tmp_path, "valgrind", "raise SystemExit('no such thing')")
        done = run("-m", "benchmarks.cost", path=tmp_path)
        assert done.returncode == 1
        assert "the row 'bare' failed under valgrind:\nno such thing" in done.stderr

    def test_without_valgrind_it_says_how_to_get_it(self, tmp_path: Path) -> None:
        done = run("-m", "benchmarks.cost", path=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "apt-get install valgrind" in done.stderr


WASTEFUL = """
import asyncio, json, threading
from contextlib import AsyncExitStack, ExitStack

import anyio

from benchmarks.live import through
from benchmarks.objects import cyclic, cyclic_cells, made


async def until(future):
    await future


def wasteful(app):
    async def middleware(scope, receive, send):
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        kept = [
            future, loop.create_task(until(future)), loop.call_later(60, print), anyio.CancelScope(),
            threading.Lock(), asyncio.Lock(), threading.Condition(), ExitStack(), AsyncExitStack(),
        ]
        scope["again"] = scope
        await app(scope, receive, send)
        future.set_result(None)
        await kept[1]
        kept[2].cancel()

    return middleware


async def main():
    bare, waste = [await made(through(wrap), 3) for wrap in (lambda app: app, wasteful)]
    left = {what: await cyclic(cell, 10) for what, cell in cyclic_cells(wasteful).items()}
    print(json.dumps({"made": {kind: waste[kind] - bare[kind] for kind in bare}, "cyclic": left}))


asyncio.run(main())
"""


class TestObjects:
    def test_nothing_is_left_to_the_collector_and_nothing_is_made_that_is_not_needed(self, tmp_path: Path) -> None:
        found = figures("objects", "--count", "50", "--live", "2000", "--gate", folder=tmp_path)
        assert set(found["cyclic"]) == {"floor", "firewall", "as it comes", "everything on"}
        assert {"everything on, HTTP", "everything on, WebSocket"} <= set(found["made"])

    def test_it_sees_what_a_wasteful_middleware_does(self) -> None:
        done = run("-c", WASTEFUL)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        # A condition has a reentrant lock of its own.
        assert found["made"] == {"tasks": 1, "futures": 1, "timers": 2, "locks": 4, "exit stacks": 2, "threads": 0}
        assert min(found["cyclic"].values()) >= 1


class TestMemory:
    def test_it_weighs_contexts_and_requests(self, tmp_path: Path) -> None:
        live = figures("memory", "--live", "30", folder=tmp_path)["live"]["30"]
        held = {"a connection's context", "create_isolated_context", "an idle connection with events"}
        assert set(live) == held | {"floor", "firewall", "everything on"}
        assert live["floor"]["traced"] < 1000  # one coroutine: what the bare app's request takes is not in it
        assert 0 < live["floor"]["traced"] < live["firewall"]["traced"] < live["everything on"]["traced"]
        assert live["create_isolated_context"]["traced"] > live["a connection's context"]["traced"] > 100
        assert live["an idle connection with events"]["traced"] > live["a connection's context"]["traced"]

    def test_it_names_the_lines_that_hold_most(self) -> None:
        done = run("-m", "benchmarks.memory", "--weigh", "create_isolated_context", "--live", "30", "--lines", "5")
        assert done.returncode == 0, done.stderr
        assert "ucm_middleware" in done.stdout


class TestTimes:
    def test_the_registry(self, tmp_path: Path) -> None:
        found = figures("registry", "--sizes", "20", "60", "--rounds", "2", "--calls", "40", folder=tmp_path)
        assert set(found["table"]) == {"20 by user id", "20 by pair", "60 by user id", "60 by pair"}
        assert set(found["manager"]) == {"20", "60"}
        for row in (*found["table"].values(), *found["manager"].values()):
            assert min(row.values()) > 0

    def test_the_copy(self, tmp_path: Path) -> None:
        found = figures("copying", "--rounds", "1", folder=tmp_path)
        for name in ("flat", "typical, nested", "large"):
            assert min(found[name].values()) > 0

    def test_the_handles(self, tmp_path: Path) -> None:
        if hasattr(UserExecutionContext, "own"):
            found = figures("handles", "--rounds", "1", folder=tmp_path)
            assert {"plain_us", "owned_us", "added_us"} <= set(found)
        else:
            done = run("-m", "benchmarks.handles")
            assert (done.returncode, done.stdout) == (2, "")
            assert "no owned handles" in done.stderr

    def test_the_egress_guard(self, tmp_path: Path) -> None:
        found = figures("egress", "--rounds", "3", "--values", "2000", folder=tmp_path)
        assert found["values"] == 2000
        assert found["with_us"] > found["without_us"] > 0
        assert found["guard_us"] > 0

    def test_the_certifier(self, tmp_path: Path) -> None:
        found = figures("certify", "--seconds", "1", folder=tmp_path)
        for app in ("quickstart_starlette:app", "quickstart_fastapi:app", "helpdesk.app:app"):
            app = f"examples.{app}"
            assert found[app]["sent"] > 0
            assert found[app]["served"] > 0
            assert found[app]["total"] > found[app]["trying"] > 0

    def test_the_walk(self, tmp_path: Path) -> None:
        found = figures("walk", "--rounds", "1", "--orders", "50", folder=tmp_path)
        assert found["objects"] > 500
        assert min(found["nothing shared"], found["one object shared"]) > 0

    def test_the_census(self, tmp_path: Path) -> None:
        found = figures("census", "--rounds", "1", folder=tmp_path)
        assert {"off_us", "record_us", "added_us", "ratio"} <= set(found)

    def test_the_spans(self, tmp_path: Path) -> None:
        found = figures("tracing", "--rounds", "1", folder=tmp_path)
        assert found["traced_ratio"] > 1
        assert found["request_us"] > 0


MISSING_LIMITS = """
import json
from benchmarks.ledger import ALONE, Figures, PLAIN, Reading, SEALED, SPANS, missed_limits

span = [Figures(30, 10, 1, 1)]
good = {PLAIN: [Figures(7.5, 30_000, 1, 5)], SEALED: [Figures(9, 12_000, 9, 9)], ALONE: [Figures(9, 1, 0.8, 9)]}
bad = {PLAIN: [Figures(9, 10, 1, 6)], SEALED: [Figures(9, 11, 9, 9)], ALONE: [Figures(9, 1, 1, 9)]}
print(json.dumps(missed_limits({SPANS: span, **good}, {"plain": Reading(10, 4), "sealed": Reading(10, 4)})))
print(json.dumps(missed_limits({SPANS: span, **bad}, {"plain": Reading(11, 1), "sealed": Reading(1, 5)})))
"""


TOO_MUCH_MEMORY = """
from benchmarks.ledger_size import Run, missed_limits

good, bad = {"verify": Run(1, 1, 160)}, {"verify": Run(1, 1, 161), "export": Run(1, 1, 9)}
print(*missed_limits({10: good, 20: bad}), sep="\\n")
"""


class TestLedger:
    def test_records_are_written_beside_spans_read_and_verified(self, tmp_path: Path) -> None:
        options = ("--rounds", "2", "--records", "192", "--kept", "300", "--folder", str(tmp_path))
        found = figures("ledger", *options, folder=tmp_path)
        ledgers = {"ledger, plain", "ledger, sealed", "ledger, plain, 1 writer"}
        assert ledgers | {"OpenTelemetry spans"} <= set(found["rows"])
        assert all(min(row.values()) > 0 for row in found["rows"].values())
        assert [len(rounds) for rounds in found["rounds"].values()] == [2] * len(found["rows"])
        assert set(found["append_us"]) == {"MemoryLedger", "SQLiteLedger"}
        assert set(found["reading"]) == {"plain", "sealed"}
        assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]

    def test_it_names_each_limit_that_is_missed(self) -> None:
        done = run("-c", MISSING_LIMITS)
        assert done.returncode == 0, done.stderr
        good, bad = map(json.loads, done.stdout.splitlines())
        assert good == []
        assert bad == [
            "CPU of a plain record: 0.30x a span, at most 0.25",
            "p99 of a plain record: 6.00 ms, at most 5",
            "a plain record alone: 1.00 ms, at most 0.8",
            "the trail of a user, plain: 11.00 ms, at most 10",
            "verifying a record, sealed: 5.00 us, at most 4",
            "plain records: 10 a second, at least 30,000",
            "sealed records: 11 a second, at least 12,000",
        ]


class TestLedgerSize:
    def test_each_command_is_run_over_a_ledger_that_is_deleted(self, tmp_path: Path) -> None:
        options = ("--records", "300", "--users", "20", "--folder", str(tmp_path))
        found = figures("ledger_size", *options, folder=tmp_path)["records"]["300"]
        commands = {"keygen", "verify", "checkpoint", "verify --checkpoints", "show --user", "export"}
        assert set(found) == {"append all", *commands}
        assert all(min(run.values()) > 0 for run in found.values())
        assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]

    def test_a_command_that_fails_is_named(self, tmp_path: Path) -> None:
        done = run("-m", "benchmarks.ledger_size", "--plain", "--records", "0", "--folder", str(tmp_path))
        assert done.returncode == 1
        assert "has no records yet" in done.stderr
        assert "audit verify" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_too_much_memory_is_named(self) -> None:
        done = run("-c", TOO_MUCH_MEMORY)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "memory of `verify` over 20 records: 161 MiB, at most 160\n"


SERIALISED_TWICE = """
from benchmarks.event_population import Counted
from ucm_middleware import EventPolicy
from ucm_middleware.events.envelope import TO_ALL, Draft, Origin

data = Counted()
for _ in range(2):
    Draft("message", [data], Origin("alice"), TO_ALL, EventPolicy())
print(data.times)
"""

MISSING_EVENT_LIMITS = """
import json
from benchmarks.events import missed_limits

print(json.dumps(missed_limits({"event, 1": 1.5, "one at a time, event, 1": 1.5}, 1, 1.1, 2048)))
print(json.dumps(missed_limits({"event, 1": 2, "one at a time, event, 1": 1.6}, 10, 1.2, 2049)))
"""


class TestEvents:
    def test_events_are_sent_beside_bare_sends_and_broadcasts(self, tmp_path: Path) -> None:
        options = ("--rounds", "2", "--times", "10", "--idle", "50", "--held", "60")
        found = figures("events", *options, folder=tmp_path)
        assert {"event, 1", "event, 10", "bare send, 1", "broadcast, 10"} <= set(found["rounds"])
        assert {len(rounds) for rounds in found["rounds"].values()} == {2}
        assert min(found["rounds"]["event, 10"]) > min(found["rounds"]["bare send, 1"]) > 0
        assert found["ratios"]["bare send, 10"] == 1
        assert found["serialised"] == 1
        assert found["among"] > 0
        assert 100 < found["bytes"]["traced"] <= 2048

    def test_it_sees_what_is_serialised_more_than_once(self) -> None:
        done = run("-c", SERIALISED_TWICE)
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr

    def test_it_names_each_limit_that_is_missed(self) -> None:
        done = run("-c", MISSING_EVENT_LIMITS)
        assert done.returncode == 0, done.stderr
        good, bad = map(json.loads, done.stdout.splitlines())
        assert good == []
        assert bad == [
            "an event to 1 connection: 2.00x a bare send, at most 1.5",
            "one at a time: an event to 1 connection: 1.60x a bare send, at most 1.5",
            "serialised for 10 connections: 10.00 times, at most 1",
            "an event among idle connections: 1.20x one alone, at most 1.1",
            "an idle connection with events: 2049 bytes, at most 2048",
        ]


class TestWire:
    def test_servers_are_visited_in_turn(self, tmp_path: Path) -> None:
        program(tmp_path, "wrk", WRK)
        program(tmp_path, "taskset", TASKSET)
        options = ("--rounds", "1", "--seconds", "1", "--gate")
        rows = figures("wire", *options, folder=tmp_path, programs=tmp_path)["rows"]
        assert rows == {
            row: {"rate": 50, "ratio": 1, "lowest": 1, "highest": 1} for row in ("bare", "everything on")
        }  # fmt: skip

    def test_an_answer_other_than_2xx_ends_the_run(self, tmp_path: Path) -> None:
        program(tmp_path, "wrk", WRK + 'print("Non-2xx or 3xx responses: 1")')
        program(tmp_path, "taskset", TASKSET)
        done = run("-m", "benchmarks.wire", "--rounds", "1", "--rows", "bare", path=tmp_path)
        assert done.returncode == 1
        assert "not every request was answered with 2xx" in done.stderr

    def test_without_wrk_it_says_how_to_get_it(self, tmp_path: Path) -> None:
        done = run("-m", "benchmarks.wire", path=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "wrk, taskset" in done.stderr
