"""``ucm audit`` on a ledger in PostgreSQL: what was done to the tables is found, and no password is shown."""

import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner, Result

from ledger_support import SECRET, make_ledger, ring, row, started
from support.postgres import Database, PostgresServer
from ucm_middleware.audit import SQLiteLedger
from ucm_middleware.cli.app import make_app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def two(database: Database) -> Database:
    """A database with two streams, of four records each: 1 to 4 and 5 to 8."""
    make_ledger(database)
    for first in (1, 5):
        with closing(started(database.app.dsn)) as ledger:
            for number in range(first, first + 4):
                ledger.append(row(f"user-{number}", number))
                ledger.flush()
    return database


def names(database: Database) -> list[str]:
    with psycopg.connect(database.app.dsn) as connection:
        return [name for (name,) in connection.execute("select stream from ucm_ledger.streams order by begun")]


def ucm(*arguments: str, status: int = 0, secret: str | None = None) -> Result:
    env = {} if secret is None else {"UCM_SECRET": secret}
    result = CliRunner().invoke(make_app(), ["audit", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def signed(database: Database) -> tuple[str, ...]:
    """Options for checkpoints over what is there now."""
    ucm("keygen", "key")
    ucm("checkpoint", database.app.dsn, "--key", "key", "--to", "checkpoints")
    return "--checkpoints", "checkpoints", "--public-key", "key.pub"


def test_a_good_ledger_is_verified_stream_by_stream_and_together(two: Database) -> None:
    done = ucm("verify", two.app.dsn)
    first, second = names(two)
    lines = done.stdout.splitlines()
    where = f"postgresql://{two.app.user}@{two.app.host}:{two.app.port}/{two.name}"
    assert lines[0] == f"verified: {where}#{first}"
    assert f"  4 records of {second}, plain" in lines
    assert "verified together: 2 of 2 ledgers (2 plain), 8 records" in lines
    assert two.app.password not in done.output
    said = json.loads(ucm("verify", two.app.dsn, "--json", "--expect", "2").stdout)
    assert (said["verified"], said["records"], said["problems"]) == (True, 8, [])
    assert [ledger["stream"] for ledger in said["ledgers"]] == [first, second]
    assert said["ledgers"][0]["first"] == "1970-01-01T00:16:41+00:00"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_of_another_encoding_has_ledgers_too(postgres_server: PostgresServer, encoding: str) -> None:
    with postgres_server.database(notes=False, encoding=encoding) as database:
        make_ledger(database)
        with closing(started(database.app.dsn)) as ledger:
            ledger.append(row("\u732b"))
            ledger.flush()
        assert "verified: " in ucm("verify", database.app.dsn).stdout
        assert json.loads(ucm("export", database.app.dsn).stdout)["user"] == "\u732b"
        signed(database)


def test_checkpoints_are_of_each_stream(two: Database) -> None:
    checked = signed(two)
    done = ucm("verify", two.app.dsn, *checked)
    assert done.stdout.count("as 1 checkpoint said, up to the last record") == 2
    assert "8 of the 8 records are as checkpoints said" in done.stdout
    assert "nothing to sign" in ucm("checkpoint", two.app.dsn, "--key", "key", "--to", "checkpoints").stdout
    with closing(started(two.app.dsn)) as ledger:
        ledger.append(row("alice", 9))
        ledger.flush()
    done = ucm("checkpoint", two.app.dsn, "--key", "key", "--to", "checkpoints")
    assert done.stdout.count("signed: 1 records of") == 1


TAMPERINGS = {
    "changed": ("update ucm_ledger.records set body = '{}' where sequence = 2", "record 2: its hash is not that"),
    "given to another": (
        "update ucm_ledger.records set subject = decode(repeat('11', 16), 'hex') where sequence = 3",
        "record 3: its hash is not that",
    ),
    "deleted": ("delete from ucm_ledger.records where sequence = 2", "record 2: it is missing"),
    "deleted at the beginning": ("delete from ucm_ledger.records where sequence = 1", "record 1: it is missing"),
    "reordered": (
        (
            "update ucm_ledger.records set sequence = 99 where sequence = 2;"
            "update ucm_ledger.records set sequence = 2 where sequence = 3;"
            "update ucm_ledger.records set sequence = 3 where sequence = 99"
        ),
        "record 2: its hash is not that",
    ),
    "put in": (
        (
            "insert into ucm_ledger.records select stream, 5, subject, body, hash from ucm_ledger.records "
            "where sequence = 4"
        ),
        "record 5: its hash is not that",
    ),
    "numbered from zero": (
        (
            "alter table ucm_ledger.records drop constraint records_sequence_check;"
            "insert into ucm_ledger.records select stream, 0, subject, body, hash from ucm_ledger.records "
            "where sequence = 1"
        ),
        "there is a record with the number 0",
    ),
    "too long": (
        "update ucm_ledger.records set body = decode(repeat('41', 16777217), 'hex') where sequence = 4",
        "record 4: its body is no blob of bytes",
    ),
    "said to be sealed": ("update ucm_ledger.ledger set sealed = true", "record 1: its hash is not that"),
    "a stream renamed": (
        (
            "update ucm_ledger.records set stream = 'stream_' || repeat('0', 32) where stream = '{first}';"
            "update ucm_ledger.streams set stream = 'stream_' || repeat('0', 32) where stream = '{first}'"
        ),
        "record 1: its hash is not that",
    ),
    "records of a stream deleted": (
        "delete from ucm_ledger.records where stream = '{first}'",
        "the stream began, with a first record, and has none: they were deleted",
    ),
    "a stream that never began": (
        "delete from ucm_ledger.streams where stream = '{first}'",
        "there are records of the stream, and it is not among those that began",
    ),
}


@pytest.mark.parametrize(("statements", "problem"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_what_was_done_is_found_without_a_checkpoint(two: Database, statements: str, problem: str) -> None:
    two.execute(statements.replace("{first}", names(two)[0]))
    assert problem in ucm("verify", two.app.dsn, status=1).stdout


def test_a_tail_that_was_cut_off_is_found_behind_a_checkpoint(two: Database) -> None:
    checked = signed(two)
    two.execute(f"delete from ucm_ledger.records where sequence = 4 and stream = '{names(two)[1]}'")
    ucm("verify", two.app.dsn)
    done = ucm("verify", two.app.dsn, *checked, status=1)
    assert "record 4: it is missing: there is a checkpoint over 4 records" in done.stdout
    assert "NOT VERIFIED TOGETHER: 1 of 2 ledgers" in done.stdout
    ucm("checkpoint", two.app.dsn, "--key", "key", "--to", "checkpoints", status=1)


def test_a_stream_that_was_deleted_altogether_is_named_behind_a_checkpoint(two: Database) -> None:
    checked = signed(two)
    first, _ = names(two)
    two.execute(
        f"delete from ucm_ledger.records where stream = '{first}';"
        f"delete from ucm_ledger.streams where stream = '{first}'"
    )
    ucm("verify", two.app.dsn)
    assert "2 streams are expected, and 1 are here" in ucm("verify", two.app.dsn, "--expect", "2", status=1).stdout
    done = ucm("verify", two.app.dsn, *checked, status=1)
    assert f"{first} is missing: there is a checkpoint over 4 records" in done.stdout


def test_a_whole_chain_computed_anew_is_found_behind_a_checkpoint(two: Database) -> None:
    checked = signed(two)
    stream = names(two)[0]
    two.execute(
        f"""update ucm_ledger.records set body = '{{"event":"opened","at":1,"outcome":"ok"}}'
            where stream = '{stream}';
        do $$
            declare
                head bytea := sha256(convert_to(E'ucm-middleware ledger 1\\n{stream}\\nplain', 'UTF8'));
                each record;
            begin
                for each in select * from ucm_ledger.records where stream = '{stream}' order by sequence loop
                    head := sha256('\\x00'::bytea || head || each.subject || each.body);
                    update ucm_ledger.records set hash = head where stream = each.stream and sequence = each.sequence;
                end loop;
            end
        $$"""
    )
    ucm("verify", two.app.dsn)
    done = ucm("verify", two.app.dsn, *checked, status=1)
    assert "one of the records 1 to 4 is not what it was: the ledger differs from the checkpoint" in done.stdout


def test_a_policy_that_hides_rows_is_not_believed(two: Database) -> None:
    two.execute(
        "create policy hiding on ucm_ledger.records using (sequence < 3);"
        "alter table ucm_ledger.records enable row level security"
    )
    assert "row-level security" in ucm("verify", two.app.dsn, status=2).stdout


def test_long_records_that_the_applications_login_puts_in_take_no_more_memory_than_a_few(two: Database) -> None:
    """Whoever has that login could end the verifier with them."""
    megabytes, number = 4, 24
    two.execute(
        f"insert into ucm_ledger.records select stream, 4 + n, subject, convert_to(repeat('x', {megabytes << 20}), "
        f"'UTF8'), hash from ucm_ledger.records, generate_series(1, {number}) n where sequence = 4",
        as_=two.app,
    )
    tracemalloc.start()
    try:
        assert "record 5:" in ucm("verify", two.app.dsn, status=1).stdout
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * number // 2 << 20


def test_it_is_verified_together_with_files(two: Database) -> None:
    with closing(SQLiteLedger("audit.db", keys=None)) as ledger:
        ledger.start(ring())
        ledger.append(row("user-2", 2))  # which is in the database too
        ledger.append(row("carol", 50))
        ledger.flush()
    done = ucm("verify", "audit.db", two.app.dsn, status=1)
    assert "NOT VERIFIED TOGETHER: 3 of 3 ledgers" in done.stdout
    assert f"a record is in several ledgers: record 1 of audit.db and record 2 of postgresql://{two.app.user}@" in (
        done.stdout
    )


def test_a_database_that_cannot_be_reached_or_has_no_ledger(two: Database, database: Database) -> None:
    password = two.app.password
    done = ucm("verify", two.app.dsn.replace(f":{two.app.port}/", ":1/"), status=2)
    assert "COULD NOT BE VERIFIED: postgresql://" in done.stdout
    assert password not in done.output
    two.execute("drop schema ucm_ledger cascade")
    assert "has no ledger" in ucm("verify", two.app.dsn, status=2).stdout
    make_ledger(two)
    assert "has no records yet" in ucm("verify", two.app.dsn, status=2).stdout
    done = ucm("verify", "postgresql://user:p@ss@host/db", status=2)
    assert "p@ss" not in done.output
    assert "ss@" not in done.output


def test_its_records_are_shown_exported_and_erased(database: Database) -> None:
    make_ledger(database, sealed=True)
    dsn, keys = database.app.dsn, ("--keys", "keys.db")
    with closing(started(dsn, keys="keys.db")) as ledger:
        ledger.append(row("alice", 1))
        ledger.append(row("bob", 2))
        ledger.flush()
    shown = ucm("show", dsn, "--user", "alice", "--json", *keys, secret=SECRET)
    assert json.loads(shown.stdout)["context_id"].endswith("1")
    exported = [json.loads(line) for line in ucm("export", dsn, *keys, secret=SECRET).stdout.splitlines()]
    assert [(record["user"], record["sequence"]) for record in exported] == [("alice", 1), ("bob", 2)]
    ucm("erase", dsn, *keys, "--user", "alice", "--reason", "asked for", "--yes", secret=SECRET)
    ucm("show", dsn, "--user", "alice", *keys, secret=SECRET, status=1)
    assert "verified together: 2 of 2 ledgers (2 sealed), 3 records" in ucm("verify", dsn).stdout


def test_without_psycopg_it_is_said_what_brings_it(two: Database) -> None:
    script = "import sys; sys.modules['psycopg'] = None; from ucm_middleware.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "audit", "verify", two.app.dsn],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert "pip install 'ucm-postgres[ledger]'" in done.stderr
    assert two.app.password not in done.stderr


def test_a_scheme_that_nothing_knows(folder: Path) -> None:
    done = ucm("verify", "mysql://user:secret@host/db", status=2)
    assert "ledgers at mysql:// are known to nothing that is installed here" in done.stderr
    assert "secret" not in done.output
