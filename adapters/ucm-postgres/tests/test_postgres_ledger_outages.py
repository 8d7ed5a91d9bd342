"""A ledger whose database is down, cut off, hung, locked or not what it was: told, waited for, made up for."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from ledger_support import make_ledger, numbers, row, started, streams
from support.postgres import Database, PostgresServer
from support.processes import Program
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import LedgerUnavailableError
from ucm_middleware.audit import queued, writer
from ucm_postgres.ledger import PostgresLedger, stream


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "STOP_PATIENCE", 0.05)
    monkeypatch.setattr(writer, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(writer, "LONGEST_PAUSE", 0.005)


@pytest.fixture
def plain(database: Database) -> Database:
    """A database with an empty ledger in the clear."""
    make_ledger(database)
    return database


@pytest.fixture
def ledger(plain: Database, postgres_proxy: TcpProxy) -> Iterator[PostgresLedger]:
    """One that has written record 1, through the proxy."""
    with closing(started(plain.app.at(postgres_proxy.port).dsn, capacity=100)) as ledger:
        ledger.append(row(number=1))
        ledger.flush()
        yield ledger


def refusal_of(ledger: PostgresLedger) -> str:
    with pytest.raises(LedgerUnavailableError) as refused:
        ledger.flush()
    return str(refused.value)


def goes_on(ledger: PostgresLedger) -> None:
    wait_until(lambda: ledger.problem is None and not ledger.lag, "it is written again")


def down(proxy: TcpProxy) -> None:
    proxy.refuse()
    proxy.cut()


def has_recovered(program: Program) -> bool:
    _, crashed, since = program.output.rpartition("terminated by signal 9")
    return bool(crashed) and "ready to accept connections" in since


def test_records_wait_while_the_server_is_down_and_none_is_lost(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    down(postgres_proxy)
    ledger.append(row(number=2))
    assert "cannot be reached" in refusal_of(ledger)
    for number in range(3, 50):
        ledger.append(row(number=number))
    assert ledger.has_room
    ledger.append(row(number=50))
    ledger.append(row(number=51))
    assert (ledger.lag, ledger.has_room) == (50, False)
    for number in range(52, 102):
        ledger.append(row(number=number))
    assert ledger.lag == 100
    with pytest.raises(LedgerUnavailableError, match="cannot be reached"):  # the line is full
        ledger.append(row(number=102))
    ledger.append(row(number=103, event="closed"))  # what has happened is kept in any case
    assert numbers(plain.app) == [1]
    postgres_proxy.refuse(False)
    goes_on(ledger)
    assert numbers(plain.app) == [*range(1, 102), 103]
    assert len(streams(plain.app)) == 1
    assert caplog.text.count("the audit ledger cannot be written, ") == 1
    assert "the audit ledger can be written again" in caplog.text
    assert plain.app.password not in caplog.text


def test_who_waits_in_a_task_is_told(ledger: PostgresLedger, postgres_proxy: TcpProxy) -> None:
    async def write() -> None:
        ledger.append(row(number=2))
        with pytest.raises(LedgerUnavailableError, match="cannot be reached"):
            await ledger.durable()

    down(postgres_proxy)
    asyncio.run(write())
    postgres_proxy.refuse(False)
    goes_on(ledger)


def test_a_connection_that_the_server_ends_is_made_anew(ledger: PostgresLedger, plain: Database) -> None:
    plain.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{app}'", as_=plain.superuser)
    ledger.append(row(number=2))
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_a_server_that_crashes_and_recovers_has_all_that_was_acknowledged(
    ledger: PostgresLedger, plain: Database, postgres_server: PostgresServer
) -> None:
    if postgres_server.program is None:
        pytest.skip("the server is somebody else's, and is not crashed")
    for number in range(2, 40):
        ledger.append(row(number=number))
    ledger.flush()
    with psycopg.connect(plain.superuser.dsn) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)  # the server ends all its processes then, and recovers
        with pytest.raises(psycopg.OperationalError):
            while True:
                connection.execute("select 1")
    program = postgres_server.program
    wait_until(lambda: has_recovered(program), "it has recovered")
    for number in range(40, 60):
        ledger.append(row(number=number))
    goes_on(ledger)
    assert numbers(plain.app) == list(range(1, 60))


@pytest.mark.parametrize("more", [0, 3], ids=["alone", "with more behind it"])
def test_a_commit_that_was_never_answered_is_not_written_twice(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy, more: int
) -> None:
    postgres_proxy.hold("replies")
    ledger.append(row(number=2))
    postgres_proxy.wait_until_held("replies")
    wait_until(lambda: numbers(plain.app) == [1, 2], "it is committed")
    for number in range(3, 3 + more):
        ledger.append(row(number=number))
    assert ledger.lag == 1 + more
    postgres_proxy.cut()
    postgres_proxy.release("replies")
    goes_on(ledger)
    ledger.append(row(number=90))
    ledger.flush()
    assert numbers(plain.app) == [*range(1, 3 + more), 90]


def test_what_never_reached_the_server_is_written_then(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy
) -> None:
    postgres_proxy.hold("requests")
    ledger.append(row(number=2))
    postgres_proxy.wait_until_held("requests")
    postgres_proxy.cut()
    postgres_proxy.release("requests")
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_nobody_waits_for_a_server_that_hangs(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_proxy.hold("replies")
    ledger.append(row(number=2))
    postgres_proxy.wait_until_held("replies")
    assert ledger.problem is None
    monkeypatch.setattr(writer, "STUCK_AFTER", 0.0)
    assert "has been writing for more than" in str(ledger.problem)
    assert "has been writing for more than" in refusal_of(ledger)
    monkeypatch.undo()
    postgres_proxy.release("replies")
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_a_table_that_somebody_locks_is_not_waited_for_without_end(
    ledger: PostgresLedger, plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.1)
    with psycopg.connect(plain.owner.dsn) as other:
        other.execute("lock table ucm_ledger.records in access exclusive mode")
        ledger.append(row(number=2))
        assert "took too long" in refusal_of(ledger)
        other.rollback()
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_a_right_that_is_taken_away_and_given_back(ledger: PostgresLedger, plain: Database) -> None:
    plain.execute("revoke insert on ucm_ledger.records from {app}")
    ledger.append(row(number=2))
    assert "the login may not do this (permission denied for table records)" in refusal_of(ledger)
    plain.execute("grant insert on ucm_ledger.records to {app}")
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_what_the_server_says_of_a_record_is_not_told(
    ledger: PostgresLedger, plain: Database, caplog: pytest.LogCaptureFixture
) -> None:
    plain.execute("alter table ucm_ledger.records add constraint small check (sequence < 2)")
    ledger.append(row("very-private-user", 2))
    said = refusal_of(ledger)
    assert "PostgreSQL says: new row for relation" in said
    for shown in (said, caplog.text):
        assert "Failing row" not in shown
        assert b"very-private-user".hex() not in shown
    plain.execute("alter table ucm_ledger.records drop constraint small")
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2]


def test_a_server_without_what_was_acknowledged_is_not_written_to(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy
) -> None:
    """A standby that took over before it had everything."""
    ledger.append(row(number=2))
    ledger.flush()
    plain.execute("delete from ucm_ledger.records where sequence = 2")
    postgres_proxy.cut()
    ledger.append(row(number=3))
    lacking = "and the 2 that were acknowledged in this process are not all there"
    wait_until(lambda: lacking in str(ledger.problem), "it sees what is not there")
    assert lacking in refusal_of(ledger)
    assert numbers(plain.app) == [1]


def test_what_somebody_else_writes_to_the_stream_is_not_followed(ledger: PostgresLedger, plain: Database) -> None:
    plain.execute(
        "insert into ucm_ledger.records select stream, 2, subject, body, hash from ucm_ledger.records", as_=plain.app
    )
    ledger.append(row(number=2))
    said = refusal_of(ledger)
    assert "something else has written records to this process's stream" in said or "there are others" in said


def test_another_ledger_in_its_place_is_not_written_to(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy
) -> None:
    plain.execute("drop schema ucm_ledger cascade")
    make_ledger(plain)
    postgres_proxy.cut()
    ledger.append(row(number=2))
    wait_until(lambda: "was here before" in str(ledger.problem), "it sees that it is another one")
    assert numbers(plain.app) == []


def test_what_was_found_written_is_not_written_again_when_the_rest_fails_once_more(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.2)
    postgres_proxy.hold("replies")
    ledger.append(row(number=2))
    postgres_proxy.wait_until_held("replies")
    wait_until(lambda: numbers(plain.app) == [1, 2], "it is committed")
    ledger.append(row(number=3))
    with psycopg.connect(plain.superuser.dsn) as connection:
        connection.execute("lock table ucm_ledger.records in share mode")
        postgres_proxy.cut()
        postgres_proxy.release("replies")
        wait_until(lambda: "took too long" in (ledger.problem or ""), "the rest could not be written")
    goes_on(ledger)
    assert numbers(plain.app) == [1, 2, 3]


def test_a_commit_that_takes_place_after_the_next_attempts_is_found(
    ledger: PostgresLedger, plain: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.2)
    plain.execute(
        """
        create function ucm_ledger.linger() returns trigger language plpgsql as $$
            begin perform pg_advisory_xact_lock_shared(7); return null; end $$;
        create constraint trigger lingers after insert on ucm_ledger.records deferrable initially deferred
            for each row execute function ucm_ledger.linger();
        """,
        as_=plain.superuser,
    )
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with psycopg.connect(plain.superuser.dsn, autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(7)")
        ledger.append(row(number=2))
        wait_until(lambda: connection.execute(waiting).fetchone() == (1,), "its commit is under way")
        postgres_proxy.cut()
        ledger.append(row(number=3))
        wait_until(lambda: "took too long" in (ledger.problem or ""), "it was tried again, with more")
        connection.execute("select pg_advisory_unlock(7)")
        goes_on(ledger)
    assert numbers(plain.app) == [1, 2, 3]
