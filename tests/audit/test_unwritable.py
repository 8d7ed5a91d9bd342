"""A ledger whose files are full, locked, read-only, moved or gone while it is written to: told, waited for, made up."""

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support.ledger_check import LedgerCheck, each_once
from support.waiting import wait_until
from ucm_middleware import LedgerFileError, LedgerUnavailableError
from ucm_middleware.audit import AuditRecord, SQLiteLedger, database, file, queued, writer
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing

SECRET = secrets.token_urlsafe(32)
NOBODY_IN_PARTICULAR = 65534


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    monkeypatch.setattr(writer, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(writer, "LONGEST_PAUSE", 0.005)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SQLiteLedger]:
    with closing(started(tmp_path)) as ledger:
        yield ledger


def started(folder: Path) -> SQLiteLedger:
    ledger = SQLiteLedger(folder / "audit.db", keys=folder / "keys.db")
    ledger.start(SecretRing.from_settings(SECRET, None, IsolatedEnvironment(environ={})))
    return ledger


def append(ledger: SQLiteLedger, *numbers: int) -> None:
    for number in numbers:
        ledger.append(AuditRecord("opened", 1000.0, f"user-{number}", record_id=number))


def refusal_of(ledger: SQLiteLedger, number: int) -> str:
    """What is said when a record cannot be written."""
    append(ledger, number)
    with pytest.raises(LedgerUnavailableError) as refused:
        ledger.flush()
    assert ledger.problem is not None
    assert ledger.lag >= 1
    return str(refused.value)


def goes_on(ledger: SQLiteLedger, *numbers: int) -> None:
    """It is written again by itself, and these records are there, each once."""
    wait_until(lambda: ledger.problem is None and not ledger.lag, "it is written again")
    ledger.close()
    records = LedgerCheck(ledger.path, ledger.keys, SECRET).read()
    assert {int(record_id, 16) for record_id in each_once(records)} == set(numbers)


def test_a_full_disk(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    append(ledger, 1)
    ledger.close()
    open_database, room = database.open_database, 1

    def with_little_room(path: Path, form: database.Form) -> sqlite3.Connection:
        connection = open_database(path, form)
        connection.execute(f"PRAGMA max_page_count = {room}")
        return connection

    monkeypatch.setattr(file, "open_database", with_little_room)
    ledger.append(AuditRecord("opened", 1000.0, "user-2", reason="x" * 50_000, record_id=2))
    with pytest.raises(LedgerUnavailableError, match=r"audit\.db: the disk is full; make room on it"):
        ledger.flush()
    append(ledger, 3)
    room = 1_000_000
    goes_on(ledger, 1, 2, 3)


@pytest.mark.parametrize("name", ["audit.db", "keys.db"])
def test_a_lock_that_another_program_holds(ledger: SQLiteLedger, name: str, tmp_path: Path) -> None:
    append(ledger, 1)
    ledger.flush()
    with closing(sqlite3.connect(tmp_path / name, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert f"{name}: another process has had it locked" in refusal_of(ledger, 2)
        append(ledger, 3)
        other.execute("ROLLBACK")
    goes_on(ledger, 1, 2, 3)


@pytest.mark.parametrize("name", ["audit.db", "keys.db"])
def test_a_file_that_is_moved_away_and_put_back(
    ledger: SQLiteLedger, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append(ledger, 1)
    ledger.flush()
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / name).rename(elsewhere)
    assert f"{name}: " in refusal_of(ledger, 2)  # by then it may have been tried again: it is not there
    assert f"{name}: was moved or deleted" in caplog.text
    elsewhere.rename(tmp_path / name)
    goes_on(ledger, 1, 2)


def test_a_key_file_that_is_deleted_is_not_written_to(
    ledger: SQLiteLedger, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(ledger, 1)
    ledger.flush()
    ledger.close()
    monkeypatch.setattr(queued, "STOP_PATIENCE", 0.05)  # it cannot be written at the end either
    shutil.copy(tmp_path / "keys.db", tmp_path / "backup")
    append(ledger, 2)
    ledger.flush()
    (tmp_path / "keys.db").unlink()
    assert "keys.db: " in refusal_of(ledger, 3)
    assert "keys.db: was moved or deleted" in caplog.text
    wait_until(lambda: "keys.db: does not exist" in (ledger.problem or ""), "it says what is missing")
    assert not (tmp_path / "keys.db").exists()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own, which is closed to others."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def as_nobody_in_particular(folder: Path) -> Iterator[None]:
    """Without the rights of root, to whom no file is read-only."""
    if os.geteuid():
        yield
        return
    for found in (folder, *folder.iterdir()):
        os.chown(found, NOBODY_IN_PARTICULAR, NOBODY_IN_PARTICULAR)
    os.setresuid(NOBODY_IN_PARTICULAR, NOBODY_IN_PARTICULAR, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def make_file_read_only(folder: Path) -> None:
    (folder / "audit.db").chmod(0o400)


def make_folder_read_only(folder: Path) -> None:
    folder.chmod(0o500)


@pytest.mark.parametrize("make_read_only", [make_file_read_only, make_folder_read_only])
def test_files_that_may_only_be_read_at_the_start(folder: Path, make_read_only: Callable[[Path], None]) -> None:
    with closing(started(folder)) as ledger:
        append(ledger, 1)
    with as_nobody_in_particular(folder):
        make_read_only(folder)
        with pytest.raises(LedgerFileError, match=r"can only be read.*make it and its folder writable"):
            started(folder)
        folder.chmod(0o700)
        (folder / "audit.db").chmod(0o600)
        with closing(started(folder)) as ledger:
            append(ledger, 2)
        goes_on(ledger, 1, 2)


def test_a_folder_that_becomes_read_only_between_two_openings(folder: Path) -> None:
    with closing(started(folder)) as ledger:
        append(ledger, 1)
        ledger.close()
        with as_nobody_in_particular(folder):
            folder.chmod(0o500)
            assert "can only be read" in refusal_of(ledger, 2)
            folder.chmod(0o700)
            goes_on(ledger, 1, 2)


def test_a_folder_that_cannot_be_reached(folder: Path) -> None:
    with closing(started(folder)) as ledger:
        append(ledger, 1)
        ledger.flush()
        with as_nobody_in_particular(folder):
            folder.chmod(0o000)
            unreachable = r"\.db: cannot be reached: Permission denied; give this process access to its folder"
            with pytest.raises(LedgerFileError, match=unreachable):
                started(folder)
            append(ledger, 2)
            with pytest.raises(LedgerUnavailableError, match=unreachable):
                ledger.flush()
            folder.chmod(0o700)
            goes_on(ledger, 1, 2)
