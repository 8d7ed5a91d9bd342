"""One ledger file and several processes: workers, forked children of a parent that writes, and ends of all kinds."""

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.ledger_check import LedgerCheck, each_once

SECRET = secrets.token_urlsafe(32)

SETTING_UP = f"""
import asyncio, multiprocessing, os, signal, sys, threading
from pathlib import Path
from ucm_middleware.audit import AuditRecord, SQLiteLedger
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing

folder = Path(sys.argv[1])
ledger = SQLiteLedger(folder / "audit.db", keys=folder / "keys.db" if sys.argv[2] == "sealed" else None)
ledger.start(SecretRing.from_settings({SECRET!r}, None, IsolatedEnvironment(environ={{}})))

def append(number):
    ledger.append(AuditRecord("opened", 1000.0, f"user-{{number % 20}}", record_id=number))

def say(number):
    os.write(1, b"%d\\n" % number)  # at once: others write to the same pipe

def in_child(work, *arguments):
    child = os.fork()
    if child == 0:
        signal.alarm(50)  # ends it when it hangs
        try:
            work(*arguments)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.fixture(params=["plain", "sealed"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def start(script: str, folder: Path, kind: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", SETTING_UP + script, str(folder), kind, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(script: str, folder: Path, kind: str, *, status: int = 0) -> str:
    """Run it to its end, which must have this status. Returns what it wrote."""
    process = start(script, folder, kind)
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        raise
    assert process.returncode == status, output
    return output


def numbers(folder: Path, kind: str) -> set[int]:
    """Of all records, of which each is there once, in one chain."""
    keys = folder / "keys.db" if kind == "sealed" else None
    return {int(number, 16) for number in each_once(LedgerCheck(folder / "audit.db", keys, SECRET).read())}


WORKER = """
first, tasks = int(sys.argv[3]), int(sys.argv[4])

async def write(number):
    append(number)
    await ledger.durable()

async def main():
    await asyncio.gather(*(write(number) for number in range(first, first + tasks)))
    await asyncio.gather(*(write(number) for number in range(first + tasks, first + 2 * tasks)))

sys.stdin.readline()
asyncio.run(main())
"""


def test_four_processes_with_five_hundred_tasks_each_make_one_chain(tmp_path: Path, kind: str) -> None:
    tasks = 500
    workers = [start(WORKER, tmp_path, kind, 10_000 * number, tasks) for number in range(4)]
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert (worker.returncode, output) == (0, "")
    assert numbers(tmp_path, kind) == {10_000 * worker + number for worker in range(4) for number in range(2 * tasks)}


FORKS_WHILE_IT_WRITES = """
ends = threading.Event()
written = []

def keep_writing():
    number = 0
    while not ends.is_set():
        append(number)
        written.append(number)
        number += 1
        if number % 20 == 0:
            ledger.flush()

def work(first):
    for number in range(first, first + 40):
        append(number)
        ledger.flush()
        say(number)

thread = threading.Thread(target=keep_writing)
thread.start()
children = [in_child(work, 100_000 * child) for child in range(1, 9)]
ends.set()
thread.join()
codes = [ended(child) for child in children]
assert codes == [0] * 8, codes
ledger.flush()
print(*written, sep="\\n", flush=True)
"""

CLOSES_AFTER_A_FORK = """
append(1)
ledger.flush()  # the file is open
go_on, may_go_on = os.pipe()
told, tell = os.pipe()

def work():
    append(2)
    ledger.flush()
    os.write(tell, b"x")
    os.read(go_on, 1)
    append(3)
    ledger.flush()
    print("1\\n2\\n3", flush=True)

child = in_child(work)
os.read(told, 1)
ledger.close()  # SQLite removes its log now, unless it sees that the child has it open
os.write(may_go_on, b"x")
assert ended(child) == 0
"""

FORKS_WHILE_IT_READS = """
ends = threading.Event()

def keep_reading():
    while not ends.is_set():
        assert ledger.trail("user-1") is not None

append(1)
threads = [threading.Thread(target=keep_reading) for _ in range(2)]
for thread in threads:
    thread.start()

def work(number):
    append(number)
    assert ledger.trail(f"user-{number}") is not None
    say(number)

codes = [ended(in_child(work, number)) for number in range(2, 12)]
ends.set()
for thread in threads:
    thread.join()
assert codes == [0] * 10, codes
say(1)
"""


@pytest.mark.parametrize(
    "script", [FORKS_WHILE_IT_WRITES, CLOSES_AFTER_A_FORK, FORKS_WHILE_IT_READS], ids=["writing", "closing", "reading"]
)
def test_a_parent_and_its_forked_children_write_one_chain(tmp_path: Path, kind: str, script: str) -> None:
    acknowledged = [int(line) for line in run(script, tmp_path, kind).split()]
    assert len(set(acknowledged)) == len(acknowledged)
    assert numbers(tmp_path, kind) == set(acknowledged)


ENDS = {
    "by itself": "append_all()",
    "by sys.exit in a thread": """
def work():
    append_all()
    sys.exit(5)

thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
    "while a thread goes on": """
threading.Thread(target=threading.Event().wait, daemon=True).start()
append_all()
""",
    "in an error": "append_all(); raise SystemExit(0)",
    "as a forked worker": """
def work():
    append_all()
    sys.exit(0)

child = os.fork()
if child == 0:
    work()
assert ended(child) == 0
""",
    "as a process of multiprocessing, forked": """
process = multiprocessing.get_context("fork").Process(target=append_all)
process.start()
process.join()
assert process.exitcode == 0
""",
}


@pytest.mark.parametrize("script", ENDS.values(), ids=ENDS)
def test_a_process_that_ends_without_closing_writes_what_is_in_line(tmp_path: Path, script: str) -> None:
    run("def append_all():\n    for number in range(3000):\n        append(number)\n\n" + script, tmp_path, "sealed")
    assert numbers(tmp_path, "sealed") == set(range(3000))
