"""``ucm audit show``, ``export`` and ``erase``: what they read, and what an erasure leaves."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from support.ledger import SECRET, bytes_of, ring, row
from support.ledgers import files_in
from ucm_middleware.audit import SQLiteLedger, UserMention, database
from ucm_middleware.cli.app import make_app

VISITOR = "anonymous_" + "7" * 32
LEDGERS = {"plain": None, "sealed": "keys.db"}


def ucm(*arguments: str) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(make_app(), ("audit", *arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def write(ledger: SQLiteLedger) -> None:
    ledger.append(row(VISITOR, 1, reason="looked around"))
    ledger.append(row("alice-liddell", 2, given_thread_id="rabbit-hole", data=(("audit_metadata", {"plan": "gold"}),)))
    ledger.append(row("alice-liddell", 3, "bound", data=(("anonymous_id", UserMention(VISITOR)),)))
    ledger.append(row(VISITOR, 4, "bound", data=(("user_id", UserMention("alice-liddell")),)))
    ledger.append(row("bob", 5, "denied", outcome="denied", data=(("asked_for", UserMention("alice-liddell")),)))
    ledger.append(row(None, 6, "refused", outcome="denied", reason="draining"))
    ledger.flush()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a ledger of each kind that an application is still writing to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UCM_SECRET", SECRET)
    with (
        closing(SQLiteLedger("plain.db", keys=None)) as plain,
        closing(SQLiteLedger("sealed.db", keys="keys.db")) as sealed,
    ):
        for ledger in (plain, sealed):
            ledger.start(ring())
            write(ledger)
        yield tmp_path


def keys_of(kind: str) -> tuple[str, ...]:
    return () if LEDGERS[kind] is None else ("--keys", "keys.db")


# show


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_a_users_trail_is_shown(kind: str) -> None:
    done = ucm("show", f"{kind}.db", *keys_of(kind), "--user", "alice-liddell")
    assert done.exit_code == 0
    assert [line.split()[1] for line in done.stdout.splitlines()[1:] if line.startswith("1970")] == ["opened", "bound"]
    assert "rabbit-hole" not in done.stdout  # the ids that are long are for --json
    assert "gold" in done.stdout


@pytest.mark.usefixtures("folder")
def test_the_ids_of_tracing_come_last() -> None:
    with closing(SQLiteLedger("plain.db", keys=None)) as ledger:
        ledger.start(ring())
        ledger.append(row("mallory", 7, seconds=2.0, data=(("phase", "teardown"),), trace_id=10, span_id=11))
    done = ucm("show", "plain.db", "--user", "mallory")
    more = done.stdout.splitlines()[1].partition("seconds=")[2]
    assert more.split(", ") == ["2.0", "phase=teardown", f"trace_id={10:032x}", f"span_id={11:016x}"]


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_a_users_trail_as_json(kind: str) -> None:
    done = ucm("show", f"{kind}.db", *keys_of(kind), "--user", "alice-liddell", "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["event"] for record in records] == ["opened", "bound"]
    assert (records[0]["thread_id"], records[0]["audit_metadata"]) == ("rabbit-hole", {"plan": "gold"})
    assert records[1]["anonymous_id"] == VISITOR


@pytest.mark.usefixtures("folder")
def test_only_the_newest_are_shown_when_asked_for() -> None:
    done = ucm("show", "plain.db", "--user", "alice-liddell", "--last", "1")
    assert "bound" in done.stdout
    assert "opened" not in done.stdout
    assert "1 older records are not shown" in done.stderr


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_what_is_nobodys_is_shown_without_a_user(kind: str) -> None:
    done = ucm("show", f"{kind}.db", *keys_of(kind))
    assert "refused" in done.stdout
    assert "alice" not in done.stdout


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_a_user_never_seen_is_said_to_be_that(kind: str) -> None:
    done = ucm("show", f"{kind}.db", *keys_of(kind), "--user", "carol")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "never seen" in done.stderr


@pytest.mark.usefixtures("folder")
def test_what_would_command_a_terminal_is_not_shown() -> None:
    with closing(SQLiteLedger("plain.db", keys=None)) as ledger:
        ledger.start(ring())
        ledger.append(row("mallory", 7, reason="\x1b[2J[red]gone[/red]"))
    done = ucm("show", "plain.db", "--user", "mallory")
    assert "\x1b" not in done.stdout
    assert "[red]gone" in done.stdout


# export


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_all_records_are_exported(kind: str) -> None:
    done = ucm("export", f"{kind}.db", *keys_of(kind))
    assert (done.exit_code, done.stderr) == (0, "")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["sequence"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.get("user") for record in records] == [
        VISITOR, "alice-liddell", "alice-liddell", VISITOR, "bob", None
    ]  # fmt: skip
    assert records[4]["data"] == {"asked_for": "alice-liddell"}
    assert [record["id"] for record in records] == [f"{number:032x}" for number in range(1, 7)]
    with closing(sqlite3.connect(f"{kind}.db")) as connection:
        hashes = [digest.hex() for (digest,) in connection.execute("SELECT hash FROM records ORDER BY sequence")]
    assert [record["hash"] for record in records] == hashes


@pytest.mark.usefixtures("folder")
def test_without_keys_only_what_stands_in_the_clear_is_exported() -> None:
    done = ucm("export", "sealed.db")
    assert done.exit_code == 0
    assert "of 5 records only what stands in the clear was written: no --keys were given" in done.stderr
    assert "liddell" not in done.stdout
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record.get("sealed", False) for record in records] == [True] * 5 + [False]
    assert records[4].keys() == {"stream", "sequence", "at", "event", "outcome", "subject", "sealed", "hash"}


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.parametrize("command", [("show", "--user", "bob"), ("export",)], ids=lambda command: command[0])
@pytest.mark.parametrize("state", ["written to", "closed"])
def test_reading_changes_nothing_of_a_copy(folder: Path, kind: str, command: tuple[str, ...], state: str) -> None:
    """Also where the process that wrote it has crashed, and left what it wrote in the log."""
    copy = folder / "copy"
    copy.mkdir()
    for file in folder.glob("*.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, copy)
    if state == "closed":
        for file in copy.glob("*.db"):
            with closing(sqlite3.connect(file)) as last:
                last.execute("SELECT * FROM sqlite_schema")
    before = without_shared_memory(copy)
    assert (f"{kind}.db-wal" in before) == (state == "written to")
    done = ucm(
        command[0],
        f"copy/{kind}.db",
        *(part.replace("keys.db", "copy/keys.db") for part in keys_of(kind)),
        *command[1:],
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert without_shared_memory(copy) == before


def without_shared_memory(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for those in which SQLite notes who reads."""
    return {name: content for name, content in files_in(folder).items() if not name.endswith("-shm")}


# erase


def erase(*more: str) -> Result:
    return ucm("erase", "sealed.db", "--keys", "keys.db", "--user", "alice-liddell", "--reason", "a request", *more)


def test_after_an_erasure_nothing_links_to_the_user_and_the_chain_verifies(folder: Path) -> None:
    assert b"liddell" in bytes_of(folder)  # in the plain one, which the scan must be able to find
    with closing(sqlite3.connect("keys.db")) as connection:
        rows = connection.execute("SELECT lookup, sealed FROM subjects").fetchall()
    before = len(rows)
    done = erase("--yes")
    assert done.exit_code == 0, done.output
    assert "erased: 2 subjects" in done.stdout
    with closing(sqlite3.connect("keys.db")) as connection:
        left = connection.execute("SELECT lookup, sealed FROM subjects").fetchall()
    gone = [value for row in rows for value in row if row not in left]
    assert (before, len(left), len(gone)) == (3, 1, 4)
    for name in ("sealed.db", "keys.db"):
        for suffix in ("", "-wal", "-shm"):
            content = Path(name + suffix).read_bytes() if Path(name + suffix).exists() else b""
            for trace in (b"liddell", b"rabbit", VISITOR.encode(), *gone):
                assert trace not in content
    assert ucm("verify", "sealed.db").exit_code == 0
    assert ucm("show", "sealed.db", "--keys", "keys.db", "--user", "alice-liddell").exit_code == 1
    exported = ucm("export", "sealed.db", "--keys", "keys.db")
    assert "liddell" not in exported.stdout
    assert "of 4 records only what stands in the clear was written: their users were erased" in exported.stderr
    records = [json.loads(line) for line in exported.stdout.splitlines()]
    assert records[4]["data"] == {"asked_for": "erased"}
    assert (records[6]["event"], records[6]["reason"], records[6]["trusted_code"]) == ("erased", "a request", True)
    assert set(records[6]["data"]["subjects"]) == {records[0]["subject"], records[1]["subject"]}


@pytest.mark.usefixtures("folder")
def test_a_worker_that_goes_on_begins_anew_with_a_user_who_comes_back() -> None:
    with closing(SQLiteLedger("sealed.db", keys="keys.db")) as worker:
        worker.start(ring())
        worker.append(row("alice-liddell", 10))
        worker.flush()
        assert erase("--yes").exit_code == 0
        worker.append(row("alice-liddell", 11))
        trail = worker.trail("alice-liddell")
    assert trail is not None
    assert [record.record_id for record in trail.records] == [11]


@pytest.mark.usefixtures("folder")
def test_an_erasure_asks_first() -> None:
    arguments = ("audit", "erase", "sealed.db", "--keys", "keys.db", "--user", "bob", "--reason", "a request")
    asked = CliRunner().invoke(make_app(), arguments, input="n\n")
    assert asked.exit_code == 1
    assert "cannot be undone" in asked.stdout
    assert ucm("show", "sealed.db", "--keys", "keys.db", "--user", "bob").exit_code == 0
    assert CliRunner().invoke(make_app(), arguments, input="y\n").exit_code == 0
    assert ucm("show", "sealed.db", "--keys", "keys.db", "--user", "bob").exit_code == 1


@pytest.mark.usefixtures("folder")
def test_a_second_erasure_says_that_there_is_nothing() -> None:
    assert erase("--yes").exit_code == 0
    again = erase("--yes")
    assert again.exit_code == 1
    assert "erased already" in again.stderr


# What cannot be read

MISTAKES = {
    "a directory": (".", "is a directory"),
    "no file": ("absent.db", "does not exist"),
    "no database": ("text.txt", "SQLite"),
    "another program's file": ("another.db", "another program"),
    "a key file": ("keys.db", "key file"),
    "an empty ledger": ("empty.db", "has no records yet"),
    "a newer format": ("newer.db", "format 2"),
}


@pytest.fixture
def mistakes(folder: Path) -> Path:
    """What somebody may give in place of a ledger."""
    Path("text.txt").write_text("not a database" * 100)
    with closing(sqlite3.connect("another.db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    for name in ("empty.db", "newer.db"):
        ledger = SQLiteLedger(name, keys=None)
        ledger.start(ring())
        ledger.close()
    with closing(sqlite3.connect("newer.db")) as connection:
        connection.execute("PRAGMA user_version = 2")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder


@pytest.mark.parametrize("command", ["show", "export", "verify"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_ledger_is_said_to_be_none_and_left_alone(mistakes: Path, command: str, mistake: str) -> None:
    name, words = MISTAKES[mistake]
    before = bytes_of(mistakes)
    done = ucm(command, name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert (words in done.stderr) or (command == "verify" and done.stderr.startswith("error:"))
    assert name in done.stderr
    assert "Traceback" not in done.output
    assert bytes_of(mistakes) == before


@pytest.mark.parametrize("name", ["absent.db", "another.db", "plain.db", "newer.db"])
def test_nothing_is_erased_from_what_is_no_sealed_ledger(mistakes: Path, name: str) -> None:
    before = bytes_of(mistakes)
    done = ucm("erase", name, "--keys", "keys.db", "--user", "bob", "--reason", "a request", "--yes")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error:")
    assert bytes_of(mistakes) == before


@pytest.mark.parametrize(
    ("secret", "words"), [("another-secret-0123456789-abcdefghijk", "under a secret"), (None, "under a secret")]
)
def test_the_wrong_secret_is_named_by_its_fingerprint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, secret: str | None, words: str
) -> None:
    if secret is None:
        monkeypatch.delenv("UCM_SECRET")
    else:
        monkeypatch.setenv("UCM_SECRET", secret)
    before = bytes_of(folder)
    for command in (("show", "--user", "bob"), ("export",), ("erase", "--user", "bob", "--reason", "r", "--yes")):
        done = ucm(command[0], "sealed.db", "--keys", "keys.db", *command[1:])
        assert (done.exit_code, done.stdout) == (2, "")
        assert words in done.stderr
        assert SECRET not in done.stderr
    assert bytes_of(folder) == before


@pytest.mark.parametrize(
    "command", [("show", "--user", "bob"), ("export",), ("erase", "--user", "bob", "--reason", "r", "--yes")]
)
@pytest.mark.usefixtures("folder")
def test_no_command_puts_the_keys_under_another_secret(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """The application has none but the old one still."""
    monkeypatch.setenv("UCM_SECRET", "a-new-one-9mWq2Lx7Rt4Zc8Vb1Ns6Kd3Hf5")
    monkeypatch.setenv("UCM_SECRET_PREVIOUS", SECRET)
    done = ucm(command[0], "sealed.db", "--keys", "keys.db", *command[1:])
    assert done.exit_code == 0, done.output
    with closing(SQLiteLedger("sealed.db", keys="keys.db")) as worker:
        worker.start(ring())


@pytest.mark.usefixtures("folder")
def test_the_secret_may_come_from_a_settings_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_SECRET")
    Path("settings.env").write_text(f"UCM_SECRET={SECRET}\n")
    done = ucm("show", "sealed.db", "--keys", "keys.db", "--env-file", "settings.env", "--user", "bob")
    assert done.exit_code == 0


@pytest.mark.usefixtures("folder")
def test_a_sealed_ledger_needs_its_keys_to_find_a_user() -> None:
    done = ucm("show", "sealed.db", "--user", "bob")
    assert done.exit_code == 2
    assert "give --keys" in done.stderr
    assert "was begun without keys" in ucm("show", "plain.db", "--keys", "keys.db", "--user", "bob").stderr


@pytest.mark.usefixtures("folder")
def test_a_user_id_that_is_none_is_refused() -> None:
    done = ucm("erase", "sealed.db", "--keys", "keys.db", "--user", " ", "--reason", "r", "--yes")
    assert done.exit_code == 2
    assert "user" in done.stderr


@pytest.mark.parametrize("kind", LEDGERS)
@pytest.mark.usefixtures("folder")
def test_a_damaged_record_is_named_as_damage(kind: str) -> None:
    with closing(sqlite3.connect(f"{kind}.db")) as connection:
        connection.execute("UPDATE records SET body = CAST(substr(body, 1, 20) AS BLOB) WHERE sequence = 5")
        connection.commit()
    for command in (("export",), ("show", "--user", "bob")):
        done = ucm(command[0], f"{kind}.db", *keys_of(kind), *command[1:])
        assert done.exit_code == 2
        assert "cannot be read" in done.stderr
        assert "ucm audit verify" in done.stderr


@pytest.mark.usefixtures("folder")
def test_an_empty_ledger_is_not_signed(tmp_path: Path) -> None:
    ledger = SQLiteLedger("empty.db", keys=None)
    ledger.start(ring())
    ledger.close()
    assert ucm("keygen", "key").exit_code == 0
    done = ucm("checkpoint", "empty.db", "--key", "key", "--to", "checkpoints")
    assert done.exit_code == 2
    assert "has no records yet" in done.stderr
    assert not Path("checkpoints").exists()


@pytest.mark.usefixtures("folder")
def test_an_erasure_that_was_cut_short_is_completed_by_another_one() -> None:
    with closing(sqlite3.connect("keys.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM subjects").fetchone()  # keeps the log in use
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "PATIENCE", 0.05)
            cut_short = erase("--yes")
    assert cut_short.exit_code == 2
    assert "erase the same user again" in cut_short.stderr
    again = erase("--yes")
    assert again.exit_code == 1  # nobody is there any more, and what was left is gone
    assert not Path("keys.db-wal").exists() or Path("keys.db-wal").stat().st_size == 0
    records = [json.loads(line) for line in ucm("export", "sealed.db", "--keys", "keys.db").stdout.splitlines()]
    assert [record["event"] for record in records].count("erased") == 1


@pytest.mark.parametrize("reason", ["", "  ", "x" * 300])
@pytest.mark.usefixtures("folder")
def test_a_reason_that_is_none_is_refused_before_anything_is_destroyed(reason: str) -> None:
    done = ucm("erase", "sealed.db", "--keys", "keys.db", "--user", "bob", "--reason", reason, "--yes")
    assert done.exit_code == 2
    assert "reason" in done.stderr
    assert ucm("show", "sealed.db", "--keys", "keys.db", "--user", "bob").exit_code == 0
