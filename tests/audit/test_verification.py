"""The verifier of ledgers: what is as it was verifies; what is not is found, by its number."""

import os
import sqlite3
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from support.ledgers import (
    ALICE,
    BOB,
    LEDGER_TABLE,
    RECORDS_TABLE,
    SUBJECT_INDEX,
    Facts,
    append_entries,
    disguise,
    facts,
    files_in,
    some_entries,
    tamper,
    write_ledger,
)
from ucm_middleware.audit.verification import Checkpoint, Verification, verify_ledger
from ucm_middleware.audit.verification.ledger_file import open_ledger
from ucm_middleware.audit.verification.tree import MerkleTree
from ucm_middleware.errors import LedgerFileError

TWELVE = facts(12)
FORGED = b'{"event":"opened","at":9,"outcome":"ok"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of twelve records."""
    return write_ledger(tmp_path / "ledger.db", TWELVE)


def checkpoint(ledger: Facts) -> Checkpoint:
    return Checkpoint(ledger.stream, len(ledger.entries), ledger.root)


def forged(ledger: Facts, record: int, body: bytes = FORGED) -> Facts:
    """The same ledger with another record at one place, all that follows from it computed anew."""
    entries = list(ledger.entries)
    entries[record - 1] = (entries[record - 1][0], body)
    return replace(ledger, entries=tuple(entries))


def only_problem(found: Verification) -> tuple[int | None, str]:
    assert len(found.problems) == 1, found.problems
    assert not found.is_verified
    return found.problems[0].record, found.problems[0].message


# What is as it should be


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 12, 1023, 1024, 1025, 2500])
def test_a_ledger_that_is_as_it_was_written_verifies(tmp_path: Path, size: int) -> None:
    ledger = facts(size)
    found = verify_ledger(write_ledger(tmp_path / "ledger.db", ledger))
    assert found == Verification(ledger.stream, False, size, ledger.root, 0, 0, ())
    assert found.is_verified


def test_a_sealed_ledger_has_another_genesis(tmp_path: Path) -> None:
    ledger = facts(3, sealed=1)
    found = verify_ledger(write_ledger(tmp_path / "ledger.db", ledger))
    assert (found.sealed, found.root, found.problems) == (True, ledger.root, ())


def test_the_tree_is_that_of_the_rfc() -> None:
    # The vectors that implementations of RFC 6962 and 9162 share.
    data = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    tree, found = MerkleTree(), list[str]()
    assert tree.root == sha256(b"").digest()
    for leaf in data:
        tree.extend([sha256(b"\x00" + bytes.fromhex(leaf)).digest()])
        found.append(tree.root.hex())
    assert found == roots


@pytest.mark.parametrize("sizes", [(0,), (1,), (12,), (3, 3, 8), (8, 3, 12), (0, 5, 11)])
def test_checkpoints_hold_in_any_order(path: Path, sizes: tuple[int, ...]) -> None:
    found = verify_ledger(path, [checkpoint(TWELVE.first(size)) for size in sizes])
    assert (found.problems, found.covered, found.checkpoints) == ((), max(sizes), len(sizes))


def test_a_checkpoint_in_the_middle_of_many_records(tmp_path: Path) -> None:
    ledger = facts(3000)
    path = write_ledger(tmp_path / "ledger.db", ledger)
    found = verify_ledger(path, [checkpoint(ledger.first(size)) for size in (1024, 1500, 2048)])
    assert (found.problems, found.covered, found.records, found.root) == ((), 2048, 3000, ledger.root)


# Tampering: what was done, the first bad record, and the words for it

RowOf = Callable[[int], tuple[int, bytes, bytes, bytes]]
REHASHED = forged(TWELVE, 5).rows()[4][3]

TAMPERING: dict[str, tuple[list[str], tuple[Any, ...], int, str]] = {
    "body edited": (["UPDATE records SET body = ? WHERE sequence = 5"], (FORGED,), 5, "hash is not that"),
    "body of the first": (["UPDATE records SET body = ? WHERE sequence = 1"], (FORGED,), 1, "hash is not that"),
    "body emptied": (["UPDATE records SET body = x'' WHERE sequence = 12"], (), 12, "hash is not that"),
    "given to another user": (["UPDATE records SET subject = ? WHERE sequence = 4"], (BOB,), 4, "hash is not that"),
    "hash edited": (["UPDATE records SET hash = zeroblob(32) WHERE sequence = 5"], (), 5, "hash is not that"),
    "hash cut": (["UPDATE records SET hash = substr(hash, 1, 31) WHERE sequence = 5"], (), 5, "31 bytes"),
    "hash of the forged body": (
        ["UPDATE records SET body = ?, hash = ? WHERE sequence = 5"],
        (FORGED, REHASHED),
        6,
        "after record 5",
    ),
    "the border moved": (
        ["UPDATE records SET subject = substr(subject, 1, 15), body = substr(subject, 16) || body WHERE sequence = 5"],
        (),
        5,
        "no blob",  # || makes text
    ),
    "the border moved, as bytes": (
        [
            "UPDATE records SET body = CAST(substr(subject, 16) || body AS BLOB) WHERE sequence = 5",
            "UPDATE records SET subject = substr(subject, 1, 15) WHERE sequence = 5",
        ],
        (),
        5,
        "15 bytes",
    ),
    "deleted": (["DELETE FROM records WHERE sequence = 5"], (), 5, "missing, and the next record there is is 6"),
    "the first deleted": (["DELETE FROM records WHERE sequence = 1"], (), 1, "next record there is is 2"),
    "the last deleted": (["DELETE FROM records WHERE sequence = 12"], (), 12, "says that it has 12"),
    "all deleted": (["DELETE FROM records"], (), 1, "says that it has 12"),
    "deleted, the rest moved up": (
        ["DELETE FROM records WHERE sequence = 5", "UPDATE records SET sequence = sequence - 1 WHERE sequence > 5"],
        (),
        5,
        "hash is not that",
    ),
    "put in": (
        [
            "UPDATE records SET sequence = -sequence - 1 WHERE sequence >= 5",
            "UPDATE records SET sequence = -sequence WHERE sequence < 0",
            "INSERT INTO records VALUES (5, zeroblob(16), ?, zeroblob(32))",
        ],
        (FORGED,),
        5,
        "hash is not that",
    ),
    "put in before the first": (
        ["INSERT INTO records VALUES (0, zeroblob(16), ?, zeroblob(32))"],
        (FORGED,),
        1,
        "numbers begin with 1",
    ),
    "added": (
        ["INSERT INTO records VALUES (13, zeroblob(16), ?, zeroblob(32))"],
        (FORGED,),
        13,
        "hash is not that",
    ),
    "added, with its hash": (
        ["INSERT INTO records VALUES (13, ?, ?, ?)"],
        facts(13).rows()[12][1:],
        13,
        "one too many",
    ),
    "added far away": (
        ["INSERT INTO records VALUES (9223372036854775807, ?, ?, ?)"],
        facts(13).rows()[12][1:],
        13,
        "missing",
    ),
    "two exchanged": (
        [
            "UPDATE records SET sequence = 99 WHERE sequence = 4",
            "UPDATE records SET sequence = 4 WHERE sequence = 7",
            "UPDATE records SET sequence = 7 WHERE sequence = 99",
        ],
        (),
        4,
        "hash is not that",
    ),
    "the last one rewritten": (
        ["UPDATE records SET body = ?, hash = ? WHERE sequence = 12"],
        forged(TWELVE, 12).rows()[11][2:],
        12,
        "head",
    ),
    "stream": (["UPDATE ledger SET stream = ?"], ("stream_" + "f" * 32,), 1, "hash is not that"),
    "sealed": (["UPDATE ledger SET sealed = 1"], (), 1, "hash is not that"),
    "head": (["UPDATE ledger SET head = zeroblob(32)"], (), 12, "head"),
    "size and frontier": (
        ["UPDATE ledger SET size = 13, frontier = ?"],
        (facts(13).frontier,),
        13,
        "says that it has 13",
    ),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found_by_the_number_of_the_first_bad_record(path: Path, what: str) -> None:
    statements, values, record, words = TAMPERING[what]
    if "no blob" in words:  # a STRICT table would not take it
        write_ledger(path, TWELVE, tables=(LEDGER_TABLE, RECORDS_TABLE.replace(" STRICT", "")))
        tamper(path, *statements, values=values)
        disguise(path, "records", RECORDS_TABLE)
    else:
        tamper(path, *statements, values=values)
    found = verify_ledger(path)
    assert found.problems[0].record == record
    assert words in found.problems[0].message
    assert str(found.problems[0]).startswith(f"record {record}: ")
    assert found.records == min(record - 1, 12) or words == "head" or words == "one too many"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE ledger SET frontier = zeroblob(64)", "frontier"),
        ("UPDATE ledger SET frontier = x''", "frontier"),
        ("UPDATE ledger SET size = 11", "frontier"),
        ("UPDATE ledger SET size = -1", "size"),
        ("UPDATE ledger SET head = x'00'", "head"),
        ("UPDATE ledger SET sealed = 2", "sealed"),
        ("UPDATE ledger SET stream = 'x' || char(27) || '[2J'", "stream"),
        ("DELETE FROM ledger", "no row"),
        ("INSERT INTO ledger SELECT 2, stream, sealed, size, head, frontier FROM ledger", "more than its one row"),
    ],
)
def test_what_the_ledger_says_of_itself_is_checked(path: Path, change: str, words: str) -> None:
    tamper(path, change)
    record, message = only_problem(verify_ledger(path))
    assert record is None
    assert words in message


@pytest.mark.parametrize("column", ["subject", "body", "hash"])
@pytest.mark.parametrize("value", ["'text'", "NULL", "7", "1.5", "x'80' || 'text'"])
def test_a_value_that_is_no_blob_is_found(path: Path, column: str, value: str) -> None:
    loose = RECORDS_TABLE.replace(" STRICT", "").replace(" NOT NULL", "").replace("BLOB", "")
    write_ledger(path, TWELVE, tables=(LEDGER_TABLE, loose))
    tamper(path, f"UPDATE records SET {column} = {value} WHERE sequence = 7")
    disguise(path, "records", RECORDS_TABLE)
    problem = verify_ledger(path).problems[0]
    assert problem.record == 7
    assert problem.message == f"its {column} is no blob of bytes"


def test_a_record_longer_than_any_may_be_is_not_read(path: Path) -> None:
    tamper(path, "UPDATE records SET body = zeroblob(17 * 1024 * 1024) WHERE sequence = 7")
    problem = verify_ledger(path).problems[0]
    assert (problem.record, "too big" in problem.message) == (7, True)


# What only a checkpoint shows


@pytest.mark.parametrize(("record", "first"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (11, 9)])
def test_a_rewritten_ledger_is_found_behind_a_checkpoint_alone(path: Path, record: int, first: int) -> None:
    write_ledger(path, forged(TWELVE, record))
    assert verify_ledger(path).is_verified
    found = verify_ledger(path, [checkpoint(TWELVE.first(size)) for size in (4, 8, 11)])
    assert only_problem(found)[0] == first
    assert "not what it was" in only_problem(found)[1]
    assert found.covered == first - 1


def test_what_was_rewritten_behind_no_checkpoint_is_not_found(path: Path) -> None:
    write_ledger(path, forged(TWELVE, 12))
    found = verify_ledger(path, [checkpoint(TWELVE.first(11))])
    assert (found.is_verified, found.covered, found.records) == (True, 11, 12)


def test_a_broken_chain_is_told_as_such_before_a_checkpoint(path: Path) -> None:
    tamper(path, "UPDATE records SET body = x'00' WHERE sequence = 5")
    found = verify_ledger(path, [checkpoint(TWELVE.first(3)), checkpoint(TWELVE.first(8)), checkpoint(TWELVE)])
    record, message = only_problem(found)
    assert (record, found.covered, found.records) == (5, 3, 4)
    assert "hash is not that of its content" in message


@pytest.mark.parametrize("kept", [0, 1, 7, 11])
def test_a_truncated_ledger_is_found_behind_a_checkpoint_alone(path: Path, kept: int) -> None:
    write_ledger(path, TWELVE.first(kept))
    assert verify_ledger(path).is_verified
    record, message = only_problem(verify_ledger(path, [checkpoint(TWELVE)]))
    assert (record, message) == (kept + 1, "it is missing: there is a checkpoint over 12 records")


def test_two_checkpoints_over_as_many_records_that_differ_are_a_fork(path: Path) -> None:
    other = checkpoint(forged(TWELVE, 7).first(8))
    for checkpoints in ([checkpoint(TWELVE.first(8)), other], [other, checkpoint(TWELVE.first(8))]):
        record, message = only_problem(verify_ledger(path, [checkpoint(TWELVE.first(6)), *checkpoints]))
        assert record == 7
        assert "forked" in message


def test_a_checkpoint_of_another_ledger_does_not_hold(path: Path) -> None:
    write_ledger(path, replace(TWELVE, stream="stream_" + "a" * 32))
    record, message = only_problem(verify_ledger(path, [checkpoint(TWELVE)]))
    assert record is None
    assert "is of another ledger" in message
    assert "replaced" in message


def test_a_checkpoint_over_nothing_must_be_that(path: Path) -> None:
    _, message = only_problem(verify_ledger(path, [Checkpoint(TWELVE.stream, 0, bytes(32))]))
    assert "the beginning is not what it was" in message


# SQLite's own structures


@pytest.mark.parametrize(
    ("index", "record", "words"),
    [
        (f"{SUBJECT_INDEX} WHERE sequence <> 6", 6, "index by subject"),
        (SUBJECT_INDEX.replace("subject)", "iif(sequence = 9, zeroblob(16), subject))"), 9, "index by subject"),
        ("CREATE INDEX records_by_subject ON records (hash)", 1, "index by subject"),
    ],
)
def test_an_index_that_hides_a_record_from_a_users_trail_is_found(
    path: Path, index: str, record: int, words: str
) -> None:
    write_ledger(path, TWELVE, index=index)
    disguise(path, "records_by_subject", SUBJECT_INDEX)
    found = only_problem(verify_ledger(path))
    assert found[0] == record
    assert words in found[1]


def test_an_index_that_shows_a_record_that_is_not_there_is_found(path: Path) -> None:
    write_ledger(path, replace(TWELVE, entries=(*TWELVE.entries, (BOB, FORGED))))
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute("SELECT * FROM sqlite_schema WHERE type = 'index'").fetchone()
    tamper(path, "DELETE FROM sqlite_schema WHERE type = 'index'")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:  # which knows of no index
        connection.execute("DELETE FROM records WHERE sequence = 13")
        claims = (12, TWELVE.head, TWELVE.frontier)
        connection.execute("UPDATE ledger SET size = ?, head = ?, frontier = ?", claims)
    tamper(path, "INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", values=schema)
    record, message = only_problem(verify_ledger(path))
    assert record is None
    assert "entries in index" in message


SCHEMAS: dict[str, tuple[str, ...]] = {
    "a view": ("ALTER TABLE records RENAME TO kept", "CREATE VIEW records AS SELECT * FROM kept"),
    "a trigger": ("CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM ledger; END",),
    "a table more": ("CREATE TABLE more (a)",),
    "a table less": ("DROP TABLE records",),
    "no index": ("DROP INDEX records_by_subject",),
    "another index": ("DROP INDEX records_by_subject", "CREATE INDEX records_by_subject ON records (hash)"),
    "a column more": ("ALTER TABLE records ADD COLUMN more BLOB",),
    "a generated column": ("ALTER TABLE records ADD COLUMN more BLOB AS (subject) VIRTUAL",),
    "statistics": ("ANALYZE",),
    "a name that draws": ('CREATE TABLE "\x1b[2J" (a)',),
}


@pytest.mark.parametrize("what", SCHEMAS)
def test_a_schema_that_is_not_the_formats_is_found(path: Path, what: str) -> None:
    tamper(path, *SCHEMAS[what])
    found = verify_ledger(path)
    record, message = only_problem(found)
    assert (record, found.records, found.stream) == (None, 0, "")
    assert message.startswith("the schema was changed (")
    assert message.isprintable()


def test_a_name_in_a_schema_that_does_not_parse_commands_no_terminal(path: Path) -> None:
    tamper(path, "UPDATE sqlite_schema SET name = char(27) || '[2J', sql = 'CREATE' WHERE name = 'records'")
    _, message = only_problem(verify_ledger(path))
    assert "?[2J" in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE records (sequence INTEGER PRIMARY KEY, subject BLOB AS (load_extension('x')) STORED)",
        "CREATE VIRTUAL TABLE records USING nothing()",
        "SELECT 1",
        "",
        "CREATE TABLE records (" * 500,
    ],
)
def test_a_schema_that_does_not_parse_is_no_crash(path: Path, sql: str) -> None:
    disguise(path, "records", sql)
    assert "schema" in only_problem(verify_ledger(path))[1]


def test_tables_that_share_their_pages_are_found(path: Path) -> None:
    tamper(path, "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = 'ledger')")
    assert not verify_ledger(path).is_verified


# A ledger in use


def test_a_ledger_is_verified_while_it_is_written_to(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        ledger = append_entries(writer, TWELVE, some_entries(5))
        seen = list[int]()

        def write_on(_stage: str, done: int, _total: int) -> None:
            nonlocal ledger
            seen.append(done)
            ledger = append_entries(writer, ledger, some_entries(1))

        found = verify_ledger(path, [checkpoint(ledger.first(15))], write_on)
        assert (found.problems, found.records, found.covered) == ((), 17, 15)
        assert seen[:2] == [15, 17]
        assert verify_ledger(path).records == len(ledger.entries) == 17 + len(seen)


def test_all_that_is_read_is_of_one_moment(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        ledger = append_entries(writer, TWELVE, some_entries(1))
        with open_ledger(path, untouched=False) as file:
            before = file.claims()
            append_entries(writer, ledger, some_entries(1))
            assert file.claims() == before
        with open_ledger(path, untouched=False) as file:
            assert file.claims() != before


def test_a_writer_that_comes_in_between_is_waited_for(path: Path) -> None:
    ledger = TWELVE

    def write_once(_stage: str, _done: int, _total: int) -> None:
        nonlocal ledger
        if ledger is TWELVE:  # comes, writes, moves all of it into the file, and goes
            with closing(sqlite3.connect(path, isolation_level=None)) as writer:
                ledger = append_entries(writer, TWELVE, some_entries(2000))

    found = verify_ledger(path, (), write_once)
    assert (found.problems, found.records, found.root) == ((), 2012, ledger.root)


def test_what_a_crash_left_in_the_log_is_read(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        ledger = append_entries(writer, TWELVE, some_entries(3))
        crashed = path.parent / "crashed"
        crashed.mkdir()
        for name in ("ledger.db", "ledger.db-wal"):
            (crashed / name).write_bytes((path.parent / name).read_bytes())
    before = files_in(crashed)
    found = verify_ledger(crashed / "ledger.db")
    assert (found.problems, found.records, found.root) == ((), 15, ledger.root)
    after = files_in(crashed)
    after.pop("ledger.db-shm")
    assert after == before


def test_nothing_is_changed(path: Path) -> None:
    before = files_in(path.parent)
    assert list(before) == ["ledger.db"]
    verify_ledger(path)
    tamper(path, "UPDATE records SET body = x'00'")
    tampered = files_in(path.parent)
    verify_ledger(path)
    assert files_in(path.parent) == tampered != before


def test_copies_that_sqlite_makes_are_ledgers(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        ledger = append_entries(writer, TWELVE, some_entries(3))  # which are in the log still
        writer.execute("VACUUM INTO ?", (str(path.with_name("vacuumed.db")),))
        with closing(sqlite3.connect(path.with_name("backup.db"))) as backup:
            writer.backup(backup)
    for name in ("vacuumed.db", "backup.db"):
        assert verify_ledger(path.with_name(name), [checkpoint(ledger)]).is_verified


def test_a_name_with_what_an_address_would_mean_otherwise(tmp_path: Path) -> None:
    path = write_ledger(tmp_path / "50% of a?mode=rwc&#ledger.db", TWELVE)
    (tmp_path / "link.db").symlink_to(path)
    assert verify_ledger(path).records == verify_ledger(tmp_path / "link.db").records == 12


# Long ledgers


def test_memory_is_bounded_by_a_record_and_not_by_how_many_there_are(tmp_path: Path) -> None:
    body = bytes(64 * 1024)
    path = write_ledger(tmp_path / "ledger.db", Facts(((ALICE, body),) * 400))
    tracemalloc.start()
    found = verify_ledger(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.problems, found.records) == ((), 400)
    assert peak < 10 * len(body)


def test_progress_is_told(path: Path) -> None:
    told = list[tuple[str, int, int]]()
    verify_ledger(path, (), lambda *step: told.append(step))
    assert told == [("records", 12, 12), ("database", 12, 12)]


@pytest.mark.parametrize("steps", [1, 5, 21, 22, 23])
def test_what_progress_raises_ends_it(tmp_path: Path, steps: int) -> None:
    path = write_ledger(tmp_path / "ledger.db", facts(20_000))
    told = list[str]()

    def tell(stage: str, _done: int, _total: int) -> None:
        told.append(stage)
        if len(told) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_ledger(path, (), tell)
    assert told == (["records"] * 20 + ["database"] * 3)[:steps]  # the last two from within SQLite


# What is no ledger


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def another_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE records (a)")


def links_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


NO_LEDGER: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (a_directory, "is a directory"),
    "nothing": (lambda path: path.unlink(), "does not exist"),
    "below a file": (links_to("/dev/null/x"), "cannot be read"),
    "a loop": (links_to("ledger.db"), "cannot be read"),
    "a device": (links_to("/dev/zero"), "not a regular file"),
    "a pipe": (a_pipe, "not a regular file"),
    "an empty file": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("hello, I am not a ledger\n" * 99), "not an SQLite database"),
    "one byte": (lambda path: path.write_bytes(b"S"), "not an SQLite database"),
    "the first bytes alone": (lambda path: path.write_bytes(path.read_bytes()[:50]), "only 50 bytes"),
    "another program's": (another_program, "not a ledger (its application id is 0x0"),
    "a key file": (lambda path: tamper(path, f"PRAGMA application_id = {0x55434D4B}"), "not a ledger"),
    "a newer format": (lambda path: tamper(path, "PRAGMA user_version = 2"), "format 2"),
    "no format": (lambda path: tamper(path, "PRAGMA user_version = 0"), "format 0"),
}


@pytest.mark.parametrize("what", NO_LEDGER)
def test_what_is_no_ledger_is_refused_in_words(path: Path, what: str) -> None:
    make, words = NO_LEDGER[what]
    make(path)
    before = files_in(path.parent) if path.is_file() else {}
    with pytest.raises(LedgerFileError) as refused:
        verify_ledger(path)
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    assert (files_in(path.parent) if path.is_file() else {}) == before


def test_a_name_that_cannot_be_one_is_refused() -> None:
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(LedgerFileError, match="cannot be read"):
            verify_ledger(Path(name))


def test_an_unfinished_transaction_of_another_mode_is_not_read_over(path: Path) -> None:
    # A rollback journal beside the file means that its pages are not those of one moment.
    tamper(path, "PRAGMA journal_mode = DELETE")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("PRAGMA cache_spill = 1")
        writer.execute("BEGIN")
        writer.execute("UPDATE records SET body = zeroblob(9000)")
        hot = path.parent / "hot"
        hot.mkdir()
        for name in files_in(path.parent):
            (hot / name).write_bytes((path.parent / name).read_bytes())
    before = files_in(hot)
    assert "ledger.db-journal" in before
    with pytest.raises(LedgerFileError):
        verify_ledger(hot / "ledger.db")
    assert files_in(hot) == before
