"""The file: made, gone on with, and what is refused in its place."""

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from support.ledger import query
from ucm_middleware import LedgerFileError
from ucm_middleware.audit.file import TAIL, LedgerFile

BOB = bytes(15) + b"b"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


def write(path: Path, *bodies: bytes) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as file:
        file.append((BOB, body) for body in bodies)


def numbered(count: int) -> list[bytes]:
    return [b"record %d" % number for number in range(1, count + 1)]


def test_what_is_written_is_there_in_order(path: Path) -> None:
    write(path, b"one", b"two")
    write(path, b"three")
    assert query(path, "SELECT sequence, subject, body FROM records") == [
        (1, BOB, b"one"),
        (2, BOB, b"two"),
        (3, BOB, b"three"),
    ]


def test_it_is_made_for_its_owner_alone(path: Path) -> None:
    write(path, b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["audit.db"]


def test_two_that_write_in_turn_make_one_chain(path: Path) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as one, closing(LedgerFile.open(path, sealed=False)) as other:
        for number, file in enumerate((one, other, other, one, other, one), 1):
            file.append([(BOB, b"%d" % number)])
    write(path)  # reads the tail again
    assert [body for (body,) in query(path, "SELECT body FROM records ORDER BY sequence")] == [
        b"%d" % number for number in range(1, 7)
    ]


def test_what_fails_half_way_is_not_there_and_the_chain_goes_on(path: Path) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as file:
        file.append([(BOB, b"one")])

        def broken() -> "list[tuple[bytes, bytes]]":
            raise RuntimeError("half way")

        with pytest.raises(RuntimeError):
            file.append(entry for entries in ([(BOB, b"lost")], broken()) for entry in entries)
        file._connection.execute("CREATE TEMP TRIGGER full BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'x'); END")
        with pytest.raises(LedgerFileError, match="x"):
            file.append([(BOB, b"lost")])
        file._connection.execute("DROP TRIGGER full")
        file.append([(BOB, b"two")])
    write(path, b"three")
    assert [body for (body,) in query(path, "SELECT body FROM records")] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("count", [0, 1, TAIL - 1, TAIL, TAIL + 1, 3 * TAIL])
def test_it_is_gone_on_with_whatever_its_length(path: Path, count: int) -> None:
    write(path, *numbered(count))
    with closing(LedgerFile.open(path, sealed=False)) as file:
        assert file.size == count
        file.append([(BOB, b"the next")])
    assert query(path, "SELECT size FROM ledger") == [(count + 1,)]


@pytest.mark.parametrize("count", [3, TAIL + 3])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE records SET body = x'00' WHERE sequence = {last}", "record {last} is not as it was written"),
        ("UPDATE records SET subject = zeroblob(16) WHERE sequence = {last}", "record {last} is not as it was written"),
        ("UPDATE records SET hash = zeroblob(32) WHERE sequence = {last}", "record {last} is not as it was written"),
        ("UPDATE records SET body = x'00' WHERE sequence = {last} - 1", "record {before} is not as it was written"),
        (
            "DELETE FROM records WHERE sequence = {last}",
            "ends with record {before}, and was written up to record {last}",
        ),
        ("DELETE FROM records WHERE sequence = {last} - 1", "record {before} is not as it was written"),
        ("INSERT INTO records VALUES ({last} + 1, x'00', x'00', x'00')", "record {after} is not as it was written"),
        ("UPDATE ledger SET size = size - 1", "ends with record {last}, and was written up to record {before}"),
        ("UPDATE ledger SET head = zeroblob(32)", "ends with record {last}"),
        ("UPDATE ledger SET frontier = x''", "ends with record {last}"),
        ("DELETE FROM ledger", "it says 0 times what it is"),
    ],
)
def test_an_end_that_is_not_as_it_was_written_is_refused(path: Path, count: int, change: str, named: str) -> None:
    write(path, *numbered(count))
    numbers = {"before": count - 1, "last": count, "after": count + 1}
    query(path, change.format(**numbers))
    before = path.read_bytes()
    with pytest.raises(LedgerFileError, match=named.format(**numbers)) as caught:
        LedgerFile.open(path, sealed=False)
    assert "ucm audit verify" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_ledger_stays_as_it_was_begun(path: Path, tmp_path: Path) -> None:
    write(path, b"one")
    with pytest.raises(LedgerFileError, match="was begun without keys"):
        LedgerFile.open(path, sealed=True)
    LedgerFile.open(tmp_path / "sealed.db", sealed=True).close()
    with pytest.raises(LedgerFileError, match="was begun with keys"):
        LedgerFile.open(tmp_path / "sealed.db", sealed=False)


def test_a_file_that_is_moved_while_it_is_written_to_is_noticed(path: Path) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as file:
        file.append([(BOB, b"one")])
        moved = path.rename(path.with_name("old.db"))
        with pytest.raises(LedgerFileError, match="was moved or deleted"):
            file.append([(BOB, b"two")])
    moved.rename(path)
    with closing(LedgerFile.open(path, sealed=False, stream=file.stream)) as again:
        assert again.size == 1


def test_a_log_that_is_taken_away_while_it_is_written_to_is_noticed(path: Path) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as file:
        file.append([(BOB, b"one")])
        path.with_name("audit.db-wal").unlink()
        with pytest.raises(LedgerFileError, match="-wal"):
            file.append([(BOB, b"two")])


def test_another_ledger_in_its_place_is_not_the_same(path: Path) -> None:
    write(path, b"one")
    [(stream,)] = query(path, "SELECT stream FROM ledger")
    path.unlink()
    with pytest.raises(LedgerFileError, match="does not exist"):
        LedgerFile.open(path, sealed=False, stream=stream)
    write(path, b"another")
    with pytest.raises(LedgerFileError, match=f"and {stream} was here before"):
        LedgerFile.open(path, sealed=False, stream=stream)


def test_a_commit_waits_for_the_disk(path: Path) -> None:
    with closing(LedgerFile.open(path, sealed=False)) as file:
        assert file._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert file._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_each_subject_is_found_through_the_index(path: Path) -> None:
    write(path, b"one")
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT body FROM records WHERE sequence >> 10 = 0 AND subject = ?", (BOB,)
        ).fetchall()
    assert "records_by_subject" in plan[0][3]
