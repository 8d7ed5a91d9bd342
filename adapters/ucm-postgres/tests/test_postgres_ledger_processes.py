"""One database and many processes: each writes a chain of its own, whatever ends them."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import psycopg
import pytest

from ledger_support import make_ledger, numbers, streams
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware.audit.verification import Given, verify_together
from ucm_middleware.testing.server import start_server
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.verifying import open_sources

HERE = Path(__file__).parent

WRITER = """
import asyncio, os, sys
from ledger_support import row, started

ledger = started(os.environ["LEDGER"])
first, count = int(sys.argv[1]), int(sys.argv[2])

async def write(number):
    ledger.append(row(f"user-{number % 20}", number))
    await ledger.durable()
    os.write(1, b"%d\\n" % number)

async def main():
    for start in range(first, first + count, 50):
        await asyncio.gather(*(write(number) for number in range(start, start + 50)))

sys.stdin.readline()
asyncio.run(main())
ledger.close()
"""


@pytest.fixture
def plain(database: Database) -> Database:
    """A database with an empty ledger in the clear."""
    make_ledger(database)
    return database


@contextmanager
def writer(dsn: str, first: int, count: int) -> Iterator[subprocess.Popen[str]]:
    """A process that writes so many records once it is told to, and says which of them are durable."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(first), str(count)],
        env={**os.environ, "LEDGER": dsn, "PYTHONPATH": f"{HERE}:{HERE.parents[2] / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stream_of(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def start(process: subprocess.Popen[str]) -> None:
    stdin = stream_of(process.stdin)
    stdin.write("\n")
    stdin.flush()


def all_verify(database: Database) -> list[int]:
    """How many records each stream has, as the verifier says."""
    with open_sources(Target(database.app.dsn)) as sources:
        together = verify_together([Given(name, source) for name, source in sources])
    assert together.problems == ()
    assert together.is_verified
    return sorted(found.records for found in together.verified)


def test_four_processes_write_four_chains_at_once(plain: Database) -> None:
    with (
        writer(plain.app.dsn, 10_000, 500) as a,
        writer(plain.app.dsn, 20_000, 500) as b,
        writer(plain.app.dsn, 30_000, 500) as c,
        writer(plain.app.dsn, 40_000, 500) as d,
    ):
        for process in (a, b, c, d):
            start(process)
        outputs = [process.communicate(timeout=50)[0] for process in (a, b, c, d)]
        assert [process.returncode for process in (a, b, c, d)] == [0] * 4
    acknowledged = sorted(int(line) for output in outputs for line in output.split())
    assert acknowledged == [first + number for first in range(10_000, 50_000, 10_000) for number in range(500)]
    assert numbers(plain.app) == acknowledged
    assert all_verify(plain) == [500] * 4


def test_kill_9_in_the_middle_leaves_chains_with_all_that_was_acknowledged(plain: Database) -> None:
    acknowledged: set[int] = set()
    for first in range(100_000, 500_000, 100_000):
        with writer(plain.app.dsn, first, 50_000) as process:
            start(process)
            output = stream_of(process.stdout)
            acknowledged.update(int(output.readline()) for _ in range(120))
            process.send_signal(signal.SIGKILL)
            acknowledged.update(int(line) for line in output.read().splitlines(keepends=True) if line.endswith("\n"))
    wait_until(lambda: not active(plain), "what the dead had sent is done")
    found = numbers(plain.app)
    assert acknowledged <= set(found)
    assert len(found) == len(set(found))
    assert len(found) < 4 * 50_000  # they were in the middle
    assert len(streams(plain.app)) == len(all_verify(plain)) == 4


def active(database: Database) -> bool:
    with psycopg.connect(database.superuser.dsn) as connection:
        query = "select count(*) from pg_stat_activity where usename = %s and application_name = 'ucm ledger'"
        return connection.execute(query, (database.app.user,)).fetchall() != [(0,)]


def test_strict_mode_on_real_workers_answers_503_while_the_database_is_down(
    database: Database, postgres_proxy: TcpProxy, tmp_path: Path
) -> None:
    make_ledger(database, sealed=True)
    env = {
        "LEDGER": database.app.at(postgres_proxy.port).dsn,
        "KEYS": str(tmp_path / "keys.db"),
        "UCM_SECRET": secrets.token_urlsafe(32),
    }
    served: list[str] = []

    with start_server("ledger_app:app", kind="uvicorn", app_dir=HERE / "apps", env=env) as server:

        def work() -> int:
            answer = httpx.get(f"{server.url}/work", headers={"x-test-user": "alice"}, timeout=30)
            if answer.status_code == 200:
                served.append(answer.json()[1])
            return answer.status_code

        assert [work(), work()] == [200, 200]
        postgres_proxy.refuse()
        postgres_proxy.cut()
        assert [work(), work()] == [503, 503]
        postgres_proxy.refuse(False)
        wait_until(lambda: work() == 200, "it is served again")
    found = streams(database.app, sealed=True)
    records = [record for stream in found.values() for record in stream]
    assert sum(record["event"] == "opened" for record in records) >= len(served) >= 3
    assert all_verify(database) == [len(records)]
