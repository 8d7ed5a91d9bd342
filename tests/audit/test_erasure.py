"""Erasure: what it destroys, that no byte of it is left in any file, and what it says when something is in the way."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.keyfiles import SECRET, STREAM, Row, content_of, ring, rows_of, workers
from ucm_middleware import ErasureIncompleteError, LedgerFileError
from ucm_middleware.audit import database
from ucm_middleware.audit.subjects import Vault

pytestmark = pytest.mark.security

ALICE = "alice-liddell@wonderland.example"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    with closing(Vault.open(path, STREAM, ring())) as vault:
        yield vault


def users(number: int, start: int = 0) -> list[str]:
    return [f"user-{each}@wonderland.example" for each in range(start, start + number)]


class TestWhatIsDestroyed:
    def test_the_user_and_nobody_else(self, vault: Vault) -> None:
        before = vault.of([ALICE, *users(200)])
        sealed = {user: subject.seal(user.encode()) for user, subject in before.items()}
        assert vault.erase(ALICE) == (before[ALICE].token,)
        assert vault.find(ALICE) is None
        assert vault.name_of(before[ALICE].token) is None
        after = vault.of(before)
        assert all(after[user].unseal(sealed[user]) == user.encode() for user in users(200))
        assert all(after[user].token == before[user].token for user in users(200))

    def test_one_who_comes_back_is_another_subject(self, vault: Vault) -> None:
        before = vault.of([ALICE])[ALICE]
        vault.erase(ALICE)
        after = vault.of([ALICE])[ALICE]
        assert after.token != before.token
        with pytest.raises(LedgerFileError):
            after.unseal(before.seal(b"hers"))

    def test_what_was_bound_to_them_too(self, vault: Vault) -> None:
        for anonymous, user in (("anonymous_1", ALICE), ("anonymous_2", ALICE), ("anonymous_3", "bob")):
            vault.bind({anonymous: user})
        tokens = {user: subject.token for user, subject in vault.of(["anonymous_1", "anonymous_2", ALICE]).items()}
        assert set(vault.erase(ALICE)) == set(tokens.values())
        assert [vault.find(user) for user in tokens] == [None, None, None]
        assert vault.find("anonymous_3") is not None

    def test_an_anonymous_one_alone(self, vault: Vault) -> None:
        vault.bind({"anonymous_1": ALICE})
        assert len(vault.erase("anonymous_1")) == 1
        assert vault.find(ALICE) is not None

    def test_a_user_never_seen(self, vault: Vault) -> None:
        vault.of(["bob"])
        assert vault.erase(ALICE) == ()
        assert vault.find("bob") is not None


class TestNoByteIsLeft:
    def test_where_the_row_shared_its_page(self, vault: Vault, path: Path) -> None:
        vault.of([ALICE, *users(3)])
        vault.bind({"anonymous_1": ALICE})
        gone = [rows_of(path)[user] for user in (ALICE, "anonymous_1")]
        assert [row.traces_in(content_of(path)) for row in gone] == [{"lookup", "sealed"}] * 2
        vault.erase(ALICE)
        assert [row.traces_in(content_of(path)) for row in gone] == [set(), set()]
        assert set(rows_of(path)) == set(users(3))

    def test_where_its_page_becomes_free(self, vault: Vault, path: Path) -> None:
        vault.of(users(300))
        rows = rows_of(path)
        for user in users(300)[:-1]:
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("DELETE FROM subjects WHERE subject = ?", (rows[user].token,))
        last = users(300)[-1]
        vault.erase(last)
        assert rows[last].traces_in(content_of(path)) == set()

    def test_where_sqlite_left_a_copy_when_it_divided_a_page(self, vault: Vault, path: Path) -> None:
        """It does so with about one row in a thousand, and secure_delete does not know of the copy."""
        copied: list[Row] = []
        number = 0
        while not copied:
            vault.of(users(1500, number))
            for user in users(1500, number)[::100]:
                vault.bind({user: "bob"})
            number += 1500
            with closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            content = content_of(path)
            # One is in the table, and one in the index by subject.
            copied = [row for row in rows_of(path).values() if content.count(row.lookup) > 2]
        row = copied[0]
        vault.erase(row.user_id)
        assert row.traces_in(content_of(path)) == set()

    def test_while_another_process_has_read_it(self, vault: Vault, path: Path) -> None:
        with workers(2) as [reader, eraser]:
            for worker in (reader, eraser):
                worker.do("open", str(path), STREAM, SECRET.decode())
            vault.of([ALICE, *users(50)])
            before = reader.do("of", ALICE, *users(50))
            row = rows_of(path)[ALICE]
            assert eraser.do("erase", ALICE) == [before[ALICE]]
            assert row.traces_in(content_of(path)) == set()
            # Neither one, whatever its connection had read before, knows the erased subject any more.
            assert vault.find(ALICE) is None
            after = reader.do("of", ALICE, *users(50))
            assert after[ALICE] != before[ALICE]
            assert all(after[user] == before[user] for user in users(50))
            assert vault.of([ALICE])[ALICE].token.hex() == after[ALICE]
            assert row.traces_in(content_of(path)) == {"lookup"}  # of the one who came back

    def test_when_it_ends_in_the_middle_and_the_file_is_closed(
        self, vault: Vault, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        vault.of([ALICE, "bob"])
        row = rows_of(path)[ALICE]
        monkeypatch.setattr(Vault, "_clean", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vault.erase(ALICE)
        vault.close()
        assert row.traces_in(content_of(path)) == set()


class TestWhatIsInTheWay:
    def test_a_reader_that_does_not_end(self, path: Path, monkeypatch: pytest.MonkeyPatch, vault: Vault) -> None:
        monkeypatch.setattr(database, "PATIENCE", 0.05)
        token = vault.of([ALICE, "bob"])[ALICE].token
        row = rows_of(path)[ALICE]
        with (
            closing(Vault.open(path, STREAM, ring())) as impatient,
            closing(sqlite3.connect(path, isolation_level=None)) as reader,
        ):
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM vault").fetchall()
            with pytest.raises(ErasureIncompleteError, match="log is in use") as caught:
                impatient.erase(ALICE)
            assert caught.value.subjects == (token,)
            for part in (str(path), "1 subjects are deleted", "end what reads the file", "erase the same user again"):
                assert part in str(caught.value)
            assert ALICE not in str(caught.value)
            assert impatient.find(ALICE) is None
            assert row.traces_in(content_of(path)) == {"lookup", "sealed"}
            reader.execute("ROLLBACK")
            assert impatient.erase(ALICE) == ()
            assert row.traces_in(content_of(path)) == set()

    def test_a_writer_that_does_not_end(self, path: Path, monkeypatch: pytest.MonkeyPatch, vault: Vault) -> None:
        monkeypatch.setattr(database, "PATIENCE", 0.05)
        vault.of([ALICE])
        with (
            closing(Vault.open(path, STREAM, ring())) as impatient,
            closing(sqlite3.connect(path, isolation_level=None)) as writer,
        ):
            writer.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerFileError, match="locked") as caught:
                impatient.erase(ALICE)
            assert type(caught.value) is LedgerFileError  # nothing is deleted
            assert impatient.find(ALICE) is not None
            writer.execute("ROLLBACK")
            assert len(impatient.erase(ALICE)) == 1
