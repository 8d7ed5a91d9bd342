"""PostgresLedger: what it writes and reads, what it may, and what is said when it cannot."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import psycopg
import pytest

from ledger_support import SECRET, make_ledger, numbers, row, started, streams
from support.pgbouncer import start_pgbouncer
from support.postgres import Database, PostgresServer
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import (
    ConfigurationError,
    LedgerFileError,
    LedgerUnavailableError,
    UserContextManager,
    managed_user_context,
)
from ucm_middleware.audit import DurableLedger, UserMention
from ucm_postgres.ledger import PostgresLedger, grants_sql, ledger_sql


@pytest.fixture
def plain(database: Database) -> Database:
    """A database with an empty ledger in the clear."""
    make_ledger(database)
    return database


@pytest.fixture
def sealed(database: Database) -> Database:
    """A database with an empty sealed ledger."""
    make_ledger(database, sealed=True)
    return database


@pytest.fixture
def ledger(plain: Database) -> Iterator[PostgresLedger]:
    with closing(started(plain.app.dsn)) as ledger:
        yield ledger


# What it writes


def test_it_is_a_durable_ledger(ledger: PostgresLedger) -> None:
    assert isinstance(ledger, DurableLedger)
    assert (ledger.lag, ledger.problem, ledger.has_room) == (0, None, True)


def test_records_are_chained_and_durable_once_that_is_awaited(ledger: PostgresLedger, plain: Database) -> None:
    async def write() -> None:
        for number in range(1, 51):
            ledger.append(row(f"user-{number % 3}", number))
            if number % 10 == 0:
                await ledger.durable()
                assert numbers(plain.app) == list(range(1, number + 1))

    asyncio.run(write())
    assert len(streams(plain.app)) == 1


def test_nothing_is_written_before_the_first_record(plain: Database) -> None:
    started(plain.app.dsn).close()
    assert streams(plain.app) == {}


def test_a_batch_of_several_statements_is_all_or_nothing(ledger: PostgresLedger, plain: Database) -> None:
    plain.execute("alter table ucm_ledger.records add constraint small check (sequence < 5)")
    for number in range(1, 6):
        ledger.append(row(number=number, reason="x" * (7 * 1024 * 1024)))
    with pytest.raises(LedgerUnavailableError, match="PostgreSQL says: new row"):
        ledger.flush()
    assert len(numbers(plain.app)) + ledger.lag == 5
    plain.execute("alter table ucm_ledger.records drop constraint small")
    wait_until(lambda: ledger.problem is None and not ledger.lag, "it is written")
    [records] = streams(plain.app).values()
    assert [len(record["reason"]) for record in records] == [7 * 1024 * 1024] * 5


def test_a_server_that_answers_before_the_disk_is_told_not_to(ledger: PostgresLedger, plain: Database) -> None:
    plain.execute(
        """create table told (setting text); grant insert on told to {app};
        create function tell() returns trigger language plpgsql as $$
            begin insert into told values (current_setting('synchronous_commit')); return null; end $$;
        create trigger tell after insert on ucm_ledger.records for each statement execute function tell()"""
    )
    ledger.append(row())
    ledger.flush()
    with psycopg.connect(plain.owner.dsn) as connection:
        assert connection.execute("show synchronous_commit").fetchall() == [("off",)]
        assert connection.execute("select setting from told").fetchall() == [("on",)]


def test_a_batch_is_one_round_trip(plain: Database, postgres_proxy: TcpProxy) -> None:
    with closing(started(plain.app.at(postgres_proxy.port).dsn)) as ledger:
        ledger.append(row(number=1))
        ledger.flush()
        before = postgres_proxy.round_trips
        for number in range(2, 12):
            ledger.append(row(number=number))
            ledger.flush()
        assert postgres_proxy.round_trips - before == 10


def test_through_pgbouncer_in_transaction_mode(plain: Database) -> None:
    with (
        start_pgbouncer(plain) as pgbouncer,
        closing(started(pgbouncer.login(plain.app).dsn)) as one,
        closing(started(pgbouncer.login(plain.app).dsn)) as other,
    ):
        for number in range(1, 21):
            (one if number % 2 else other).append(row(number=number))
            one.flush()
            other.flush()
        trail = one.trail("alice")
    assert trail is not None
    assert len(trail.records) == 20
    assert numbers(plain.app) == list(range(1, 21))
    assert len(streams(plain.app)) == 2


def test_each_ledger_has_a_stream_of_its_own(plain: Database) -> None:
    with closing(started(plain.app.dsn)) as one, closing(started(plain.app.dsn)) as other:
        one.append(row(number=1))
        other.append(row(number=2))
        one.flush()
        other.flush()
        one.append(row(number=3))
        one.close()  # and goes on with the same stream
        one.append(row(number=4))
        one.flush()
    found = [[int(record["id"], 16) for record in records] for records in streams(plain.app).values()]
    assert sorted(found) == [[1, 3, 4], [2]]


def test_a_forked_child_has_a_stream_of_its_own(ledger: PostgresLedger, plain: Database) -> None:
    ledger.append(row(number=1))
    ledger.flush()
    child = os.fork()
    if child == 0:
        try:
            ledger.append(row(number=2))
            ledger.flush()
        except BaseException:  # noqa: BLE001 - the child may not go on with pytest
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ledger.append(row(number=3))
    ledger.flush()
    found = [[int(record["id"], 16) for record in records] for records in streams(plain.app).values()]
    assert sorted(found) == [[1, 3], [2]]


# What it reads


def test_the_trail_of_a_user_is_of_all_streams_by_time(plain: Database) -> None:
    with closing(started(plain.app.dsn)) as one, closing(started(plain.app.dsn)) as other:
        for number in range(1, 7):
            (one if number % 2 else other).append(row("alice", number, "opened" if number < 5 else "closed"))
        other.append(row("bob", 7))
        other.append(row(None, 8, "privileged"))
        other.flush()
        trail = one.trail("alice")
        assert trail is not None
        assert [record.record_id for record in trail.records] == [1, 2, 3, 4, 5, 6]
        assert trail.opening is not None
        assert (trail.opening.record_id, trail.dropped) == (4, 0)
        assert (one.knows("bob"), one.knows("carol"), one.trail("carol")) == (True, False, None)
        nobodys = one.trail(None)
        assert nobodys is not None
        assert [record.record_id for record in nobodys.records] == [8]


def test_a_trail_shows_the_newest_and_counts_the_older(ledger: PostgresLedger) -> None:
    for number in range(1, 1201):
        ledger.append(row("alice", number, "opened" if number == 1 else "event_sent"))
    trail = ledger.trail("alice")
    assert trail is not None
    assert trail.opening is not None
    assert (len(trail.records), trail.dropped, trail.opening.record_id) == (1000, 200, 1)
    assert [record.record_id for record in trail.records] == list(range(201, 1201))


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SQL_ASCII"])
def test_what_is_in_a_record_keeps_no_trail_from_being_read(postgres_server: PostgresServer, encoding: str) -> None:
    """Not a NUL, which no text of PostgreSQL's has, nor a character that the database's encoding lacks."""
    with postgres_server.database(notes=False, encoding=encoding) as database:
        make_ledger(database)
        with closing(started(database.app.dsn)) as ledger:
            for number, user in enumerate(("zo\u00eb", "\u732b"), 1):
                ledger.append(row(user, number, reason="a\0b", data=(("note", "\0 \u732b"),)))
                trail = ledger.trail(user)
                assert trail is not None
                assert [(record.user_id, record.reason) for record in trail.records] == [(user, "a\0b")]


def test_a_sealed_ledger_shows_nobody_to_whoever_reads_the_tables(sealed: Database, tmp_path: Path) -> None:
    with closing(started(sealed.app.dsn, keys=tmp_path / "keys.db")) as ledger:
        ledger.append(row("alice", 1, reason="very private", data=(("user_id", UserMention("bob")),)))
        trail = ledger.trail("alice")
    assert trail is not None
    assert (trail.records[0].reason, dict(trail.records[0].data)) == ("very private", {"user_id": "bob"})
    with psycopg.connect(sealed.owner.dsn) as connection:
        stored = connection.execute("select string_agg(body, '') from ucm_ledger.records").fetchall()[0][0]
    assert b"private" not in stored
    assert b"alice" not in stored
    assert b"bob" not in stored
    assert len(streams(sealed.app, sealed=True)) == 1


def test_an_erased_user_cannot_be_read_and_the_erasure_is_on_record(sealed: Database, tmp_path: Path) -> None:
    with closing(started(sealed.app.dsn, keys=tmp_path / "keys.db")) as ledger:
        ledger.append(row("anonymous-1", 1))
        ledger.append(row("anonymous-1", 2, "bound", data=(("user_id", UserMention("alice")),)))
        ledger.append(row("alice", 3))
        ledger.append(row("bob", 4))
        assert ledger.erase("alice", reason="request of 2026") == 2
        assert ledger.trail("alice") is ledger.trail("anonymous-1") is None
        assert ledger.trail("bob") is not None
        nobodys = ledger.trail(None)
    assert nobodys is not None
    assert [(record.event, record.reason) for record in nobodys.records] == [("erased", "request of 2026")]
    streams(sealed.app, sealed=True)


def test_two_machines_have_a_key_file_each(sealed: Database, tmp_path: Path) -> None:
    """What the README says of it: each opens what it has written, and erases that."""
    with (
        closing(started(sealed.app.dsn, keys=tmp_path / "one.db")) as one,
        closing(started(sealed.app.dsn, keys=tmp_path / "other.db")) as other,
    ):
        one.append(row("alice", 1))
        other.append(row("alice", 2))
        other.append(row("bob", 3))
        one.flush()
        other.flush()
        for ledger, number in ((one, 1), (other, 2)):
            trail = ledger.trail("alice")
            assert trail is not None
            assert [record.record_id for record in trail.records] == [number]
        assert one.knows("bob")  # which another key file would have to say
        assert one.trail("bob") is None
        assert one.erase("alice", reason="asked for") == 1
        assert one.trail("alice") is None
        assert other.trail("alice") is not None


# What it may, and what is refused at the start


def test_the_login_of_the_application_can_neither_change_nor_delete(ledger: PostgresLedger, plain: Database) -> None:
    ledger.append(row())
    ledger.flush()
    for statement in (
        "update ucm_ledger.records set body = ''",
        "delete from ucm_ledger.records",
        "truncate ucm_ledger.records",
        "update ucm_ledger.streams set begun = now()",
        "delete from ucm_ledger.streams",
        "insert into ucm_ledger.streams (stream, begun) values ('stream_' || repeat('0', 32), now())",
        "insert into ucm_ledger.ledger values (1, 'x', 1, true)",
        "update ucm_ledger.ledger set format = 2",
        "drop table ucm_ledger.records",
        "alter table ucm_ledger.records disable trigger all",
        "create table ucm_ledger.more (x int)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            plain.execute(statement, as_=plain.app)


def test_a_reader_may_not_write(plain: Database) -> None:
    auditor = plain.login("auditor")
    plain.execute(grants_sql(readers=[auditor.user]))
    with psycopg.connect(auditor.dsn) as connection:
        assert connection.execute("select count(*) from ucm_ledger.records").fetchall() == [(0,)]
    with closing(started(auditor.dsn)) as ledger:
        ledger.append(row())
        with pytest.raises(Exception, match=r"may not do this .permission denied"):
            ledger.flush()


def test_another_login_is_let_in_later(plain: Database) -> None:
    other = plain.login("other")
    with pytest.raises(LedgerFileError, match=r"the login may not do this .*grants_sql"):
        started(other.dsn)
    plain.execute(grants_sql(other.user))
    with closing(started(other.dsn)) as ledger:
        ledger.append(row())
        ledger.flush()
    assert numbers(other) == [1]


def test_everybody_is_no_login() -> None:
    for grant in (partial(grants_sql, "public"), partial(grants_sql, "app", readers=["public"])):
        with pytest.raises(ConfigurationError, match="'public' is all of them"):
            grant()


def refusal_of(dsn: str, keys: Path | None = None) -> str:
    with pytest.raises(LedgerFileError) as refused:
        started(dsn, keys=keys)
    return str(refused.value)


def test_a_database_without_a_ledger_is_refused(database: Database) -> None:
    said = refusal_of(database.app.dsn)
    assert "has no ledger" in said
    assert "ledger_sql" in said
    assert database.app.password not in said


def test_a_ledger_of_another_format_is_refused(plain: Database) -> None:
    plain.execute("update ucm_ledger.ledger set format = 2")
    assert "has a ledger of format 2, and this version of ucm-postgres knows format 1" in refusal_of(plain.app.dsn)


def test_keys_must_be_as_the_ledger_was_made(plain: Database, tmp_path: Path) -> None:
    assert "was made to be in the clear" in refusal_of(plain.app.dsn, tmp_path / "keys.db")
    plain.execute("update ucm_ledger.ledger set sealed = true")
    assert "was made to be sealed" in refusal_of(plain.app.dsn)


def test_the_key_file_of_another_ledger_is_refused(
    sealed: Database, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    started(sealed.app.dsn, keys=tmp_path / "keys.db").close()
    with postgres_server.database() as other:
        make_ledger(other, sealed=True)
        assert "belongs to the ledger ledger_" in refusal_of(other.app.dsn, tmp_path / "keys.db")


def test_a_server_that_is_not_there_or_refuses_is_told_without_the_password(plain: Database) -> None:
    password = plain.app.password
    for dsn in (
        plain.app.dsn.replace(str(plain.app.port), "1"),
        plain.app.dsn.replace(password, "wr@ng!".replace("@", "%40")),
    ):
        said = refusal_of(dsn)
        assert "cannot be reached" in said
        assert password not in said
        assert "wr@ng" not in said


def test_bad_input() -> None:
    with pytest.raises(ConfigurationError, match="the DSN cannot be read"):
        PostgresLedger("postgresql://u:p@ss@host/db", keys=None)
    with pytest.raises(ConfigurationError, match="capacity must be"):
        PostgresLedger("postgresql://host/db", keys=None, capacity=1)
    with pytest.raises(ConfigurationError, match="writers is empty"):
        ledger_sql(sealed=False)
    with pytest.raises(ConfigurationError, match="cannot be a name"):
        ledger_sql("a\0b", sealed=False)
    assert '"a""; drop' in ledger_sql('a"; drop', sealed=False)
    assert "secret" not in repr(PostgresLedger("postgresql://u:secret@host/db", keys=None))


async def test_a_manager_writes_to_it(plain: Database) -> None:
    with closing(PostgresLedger(plain.app.dsn, keys=None)) as ledger:
        manager = UserContextManager(ledger=ledger, audit="strict", secret=SECRET)
        async with managed_user_context(manager.create_isolated_context("alice")):
            await ledger.durable()
            trail = await asyncio.to_thread(manager.get_audit_trail, "alice")
        ledger.flush()
    assert trail is not None
    assert [event["event"] for event in trail["events"]] == ["opened"]
    [records] = streams(plain.app).values()
    assert [record["event"] for record in records if record.get("user") == "alice"] == ["opened", "closed"]
