"""Subjects: who gets one, what they seal, that one user has one whoever asks, and that nothing is kept of them."""

import gc
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import ucm_middleware
from support.keyfiles import OTHER, SECRET, STREAM, content_of, in_all, ring, rows_of, workers
from ucm_middleware import IdentityConflictError, LedgerFileError
from ucm_middleware.audit import database, keyfile
from ucm_middleware.audit.subjects import Subject, Vault

pytestmark = pytest.mark.security


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys ?#%41.db"


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    with closing(Vault.open(path, STREAM, ring())) as vault:
        yield vault


class TestWhoHasOne:
    def test_a_user_keeps_theirs(self, vault: Vault, path: Path) -> None:
        first = vault.of(["alice", "böb-😀", "alice"])
        assert set(first) == {"alice", "böb-😀"}
        assert first["alice"].token != first["böb-😀"].token
        with closing(Vault.open(path, STREAM, ring(), must_exist=True)) as again:
            second = again.of(["böb-😀", "carol", "alice"])
        assert {name: second[name].token for name in first} == {name: first[name].token for name in first}
        assert second["alice"].unseal(first["alice"].seal(b"hers")) == b"hers"

    def test_any_number_at_once(self, vault: Vault) -> None:
        users = [f"user-{number}" for number in range(1001)]
        made = vault.of(users[:600])
        all_of_them = vault.of(users)
        assert list(all_of_them) != [] == list(vault.of([]))
        assert len({subject.token for subject in all_of_them.values()}) == 1001
        assert all(all_of_them[user].token == made[user].token for user in users[:600])

    def test_to_look_makes_none(self, vault: Vault) -> None:
        assert vault.find("alice") is None
        assert vault.name_of(bytes(16)) is None
        assert vault.find("alice") is None
        made = vault.of(["alice"])["alice"]
        found = vault.find("alice")
        assert found is not None
        assert (found.token, len(found.token)) == (made.token, 16)
        assert vault.name_of(made.token) == "alice"

    def test_under_another_name_of_the_file(self, vault: Vault, path: Path) -> None:
        token = vault.of(["alice"])["alice"].token
        link = path.with_name("link.db")
        link.symlink_to(path)
        with closing(Vault.open(link, STREAM, ring(), must_exist=True)) as linked:
            assert linked.of(["alice", "bob"])["alice"].token == token
        assert vault.find("bob") is not None

    def test_another_connection_sees_them_at_once(self, vault: Vault, path: Path) -> None:
        with closing(Vault.open(path, STREAM, ring())) as other:
            for user in ("alice", "bob"):
                token = vault.of([user])[user].token
                assert other.name_of(token) == user
                assert other.of([user])[user].token == token

    def test_ids_that_differ_in_form_are_different_users(self, vault: Vault) -> None:
        users = ["é", "e\u0301", "E", "e", "e "]
        assert len({subject.token for subject in vault.of(users).values()}) == len(users)


class TestSealing:
    def test_only_the_subject_opens_it(self, vault: Vault, path: Path) -> None:
        subjects = vault.of(["alice", "bob"])
        sealed = subjects["alice"].seal(b"her records")
        assert len(sealed) == len(b"her records") + 28
        assert b"records" not in sealed
        assert subjects["alice"].unseal(sealed) == b"her records"
        for subject, given in (
            (subjects["bob"], sealed),
            (subjects["alice"], sealed[:-1]),
            (subjects["alice"], bytes([sealed[0] ^ 1]) + sealed[1:]),
            (subjects["alice"], sealed[:5]),
            (subjects["alice"], b""),
        ):
            with pytest.raises(LedgerFileError) as caught:
                subject.unseal(given)
            assert caught.value.path == str(path)
            assert subject.token.hex() in str(caught.value)
            assert "altered, or sealed under another key" in str(caught.value)
            assert caught.value.__context__ is None

    def test_no_two_are_sealed_alike(self, vault: Vault) -> None:
        alice = vault.of(["alice"])["alice"]
        assert len({alice.seal(b"same")[:12] for _ in range(1000)}) == 1000

    def test_by_the_documentation(self, vault: Vault, path: Path) -> None:
        """What the format says opens the file, and what was sealed."""
        alice = vault.of(["alice", "bob"])["alice"]
        sealed = alice.seal(b"her records")
        rows = rows_of(path)
        assert {user: row.token for user, row in rows.items()} == {u: s.token for u, s in vault.of(rows).items()}
        row = rows["alice"]
        assert len(row.key) == 32
        assert AESGCM(row.key).decrypt(sealed[:12], sealed[12:], row.token) == b"her records"
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA application_id").fetchone() == (0x55434D4B,)
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def test_nothing_secret_shows(self, vault: Vault, path: Path) -> None:
        alice = vault.of(["alice"])["alice"]
        shown = repr(alice) + repr(vault)
        assert "alice" not in shown
        assert repr(rows_of(path)["alice"].key)[2:12] not in shown


class TestBinding:
    def test_is_what_the_file_says(self, vault: Vault, path: Path) -> None:
        before = vault.of(["anonymous_1"])["anonymous_1"].token
        vault.bind({"anonymous_1": "alice"})
        vault.bind({"anonymous_1": "alice"})
        vault.bind({"anonymous_2": "alice"})
        rows = rows_of(path)
        assert rows["anonymous_1"].token == before
        assert rows["anonymous_1"].bound_to == rows["anonymous_2"].bound_to == rows["alice"].token
        assert rows["alice"].bound_to is None

    def test_to_a_second_user_is_refused(self, vault: Vault, path: Path) -> None:
        vault.bind({"anonymous_1": "alice"})
        with pytest.raises(IdentityConflictError, match="bound to another user"):
            vault.bind({"anonymous_1": "bob"})
        assert rows_of(path)["anonymous_1"].bound_to == rows_of(path)["alice"].token
        assert vault.find("bob") is None

    def test_many_are_bound_at_once_or_none(self, vault: Vault, path: Path) -> None:
        visitors = {f"anonymous_{number}": f"user-{number % 3}" for number in range(20)}
        vault.bind(visitors)
        rows = rows_of(path)
        assert all(rows[visitor].bound_to == rows[user].token for visitor, user in visitors.items())
        with pytest.raises(IdentityConflictError):
            vault.bind({"anonymous_20": "alice", "anonymous_0": "alice"})
        assert "anonymous_20" not in rows_of(path)


class TestSeveralProcesses:
    def test_one_user_has_one_subject_whoever_is_first(self, path: Path) -> None:
        """They also race to make the file."""
        users, more = [f"user-{number}" for number in range(40)], [f"more-{number}" for number in range(40)]
        with workers(4) as some:
            list(in_all(some, *[("open", str(path), STREAM, SECRET.decode())] * 4))
            for user in users:
                list(in_all(some, *[("of", user)] * 4))
            batches = [secrets.SystemRandom().sample(users + more, 60) for _ in some]
            found = list(in_all(some, *[("of", *batch) for batch in batches]))
        tokens = {user: row.token.hex() for user, row in rows_of(path).items()}
        assert len(set(tokens.values())) == len(tokens) >= 60
        for answer, batch in zip(found, batches, strict=True):
            assert answer == {user: tokens[user] for user in batch}
        assert sorted(file.name for file in path.parent.iterdir() if file.is_dir()) == []

    def test_a_subject_survives_the_process_that_was_given_it(self, path: Path) -> None:
        with workers(1) as [worker]:
            worker.do("open", str(path), STREAM, SECRET.decode())
            [token] = worker.do("of", "alice").values()
            sealed = bytes.fromhex(worker.do("seal", "bob", "his"))
            worker.process.send_signal(signal.SIGKILL)
            worker.process.wait(60)
        with closing(Vault.open(path, STREAM, ring(), must_exist=True)) as vault:
            alice, bob = vault.find("alice"), vault.find("bob")
            assert alice is not None
            assert bob is not None
            assert alice.token.hex() == token
            assert bob.unseal(sealed) == b"his"

    def test_where_another_one_writes_for_too_long(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, vault: Vault
    ) -> None:
        vault.of(["alice"])
        monkeypatch.setattr(database, "PATIENCE", 0.05)
        with (
            closing(Vault.open(path, STREAM, ring())) as impatient,
            closing(sqlite3.connect(path, isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            assert set(impatient.of(["alice"])) == {"alice"}
            with pytest.raises(LedgerFileError, match="another process has had it locked") as caught:
                impatient.of(["alice", "bob"])
            assert caught.value.path == str(path)
            other.execute("ROLLBACK")
            assert set(impatient.of(["alice", "bob"])) == {"alice", "bob"}


class TestNothingIsKept:
    def test_of_a_batch(self, vault: Vault) -> None:
        def subjects() -> list[object]:
            gc.collect()
            return [thing for thing in gc.get_objects() if type(thing) is Subject]

        before = len(subjects())
        batch = vault.of(["alice", "bob"])
        assert len(subjects()) == before + 2
        del batch
        vault.of(["alice", "bob"])
        vault.find("alice")
        vault.bind({"anonymous_1": "alice"})
        assert len(subjects()) == before

    def test_of_one_that_is_closed(self, vault: Vault) -> None:
        vault.close()
        vault.close()
        for use in (
            lambda: vault.of(["alice"]),
            lambda: vault.find("alice"),
            lambda: vault.name_of(bytes(16)),
            lambda: vault.bind({"anonymous_1": "alice"}),
            lambda: vault.erase("alice"),
        ):
            with pytest.raises(LedgerFileError, match="is closed"):
                use()


@pytest.mark.parametrize("while_open", [False, True])
def test_what_is_opened_to_be_read_writes_nothing(path: Path, while_open: bool) -> None:
    vault = Vault.open(path, STREAM, ring())
    vault.of(["alice"])
    if not while_open:
        vault.close()
    with closing(Vault.open_existing(path, STREAM, ring(), read_only=True)) as reading:
        for use in (lambda: reading.of(["bob"]), lambda: reading.erase("alice")):
            with pytest.raises(LedgerFileError, match="can only be read"):
                use()
        assert reading.find("alice") is not None
    vault.close()
    assert set(rows_of(path)) == {"alice"}


class TestRotation:
    def test_the_file_goes_over_to_the_current_secret(self, path: Path) -> None:
        with closing(Vault.open(path, STREAM, ring())) as vault:
            token = vault.of(["alice"])["alice"].token
        with closing(Vault.open(path, STREAM, ring(OTHER, SECRET))) as vault:
            assert vault.of(["alice"])["alice"].token == token
        assert rows_of(path, OTHER)["alice"].token == token
        with closing(Vault.open(path, STREAM, ring(OTHER))) as vault:
            assert vault.name_of(token) == "alice"
        with pytest.raises(LedgerFileError, match="fingerprint"):
            Vault.open(path, STREAM, ring(SECRET))

    def test_whoever_only_opens_it_leaves_it_under_the_secret_that_it_is_under(self, path: Path) -> None:
        with closing(Vault.open(path, STREAM, ring())) as vault:
            token = vault.of(["alice"])["alice"].token
        before = content_of(path)
        with closing(Vault.open_existing(path, STREAM, ring(OTHER, SECRET))) as read:
            assert read.name_of(token) == "alice"
        assert content_of(path) == before
        with closing(Vault.open(path, STREAM, ring())) as again:
            assert again.name_of(token) == "alice"

    def test_the_order_of_an_exchange(self, path: Path) -> None:
        """Of docs/how-to/owner-derived-keys.md: the worker that starts last decides, and a reader finds out."""
        Vault.open(path, STREAM, ring()).close()
        for order in ((SECRET, OTHER), (OTHER, SECRET), (SECRET, OTHER), (OTHER, SECRET)):
            Vault.open(path, STREAM, ring(*order), must_exist=True).close()
            Vault.open_existing(path, STREAM, ring(order[0])).close()
            with pytest.raises(LedgerFileError, match="fingerprint"):
                Vault.open_existing(path, STREAM, ring(order[1]))

    def test_one_that_is_open_meanwhile_goes_on(self, vault: Vault, path: Path) -> None:
        token = vault.of(["alice"])["alice"].token
        with closing(Vault.open(path, STREAM, ring(OTHER, SECRET))) as rotated:
            bob = vault.of(["bob"])["bob"].token
            assert rotated.name_of(bob) == "bob"
            assert vault.name_of(token) == "alice"

    def test_in_several_processes_at_once(self, path: Path) -> None:
        with closing(Vault.open(path, STREAM, ring())) as vault:
            token = vault.of(["alice"])["alice"].token.hex()
        with workers(4) as some:
            request = ("open", str(path), STREAM, OTHER.decode(), SECRET.decode())
            list(in_all(some, *[request] * 4))
            assert list(in_all(some, *[("of", "alice")] * 4)) == [{"alice": token}] * 4
        assert rows_of(path, OTHER)["alice"].token.hex() == token

    def test_another_process_was_faster_with_yet_another_one(self, vault: Vault, path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            before = connection.execute("SELECT * FROM vault").fetchall()
            keyfile._reseal(connection, "its old one", bytes(32), ring(OTHER).all[0])
            assert connection.execute("SELECT * FROM vault").fetchall() == before


FORK = """
import gc, os, sys
from contextlib import closing
from pathlib import Path
from support.keyfiles import STREAM, ring
from ucm_middleware import LedgerFileError
from ucm_middleware.audit.subjects import Vault

path = Path(sys.argv[1])
vault = Vault.open(path, STREAM, ring())
token = vault.of(["alice"])["alice"].token

def open_files():
    found = 0
    for number in range(64):
        try:
            found += os.path.samestat(os.fstat(number), path.stat())
        except OSError:
            continue
    return found

child = os.fork()
if child == 0:
    try:
        vault.of(["alice"])
    except LedgerFileError as error:
        assert "in the parent process" in str(error), error
    else:
        raise AssertionError("a child used the connection of its parent")
    before = open_files()
    vault.close()
    del vault
    gc.collect()
    assert open_files() == before > 0, "a child closed the connection of its parent"
    with closing(Vault.open(path, STREAM, ring())) as mine:
        assert mine.of(["alice", "bob"])["alice"].token == token
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert Path(f"{path}-wal").exists()
assert set(vault.of(["alice", "bob", "carol"])) == {"alice", "bob", "carol"}
assert vault.name_of(token) == "alice"
vault.close()
print("done")
"""


def test_a_forked_child_leaves_it_to_its_parent(path: Path) -> None:
    folders = [str(Path(__file__).parents[1]), str(Path(ucm_middleware.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
    assert set(rows_of(path)) == {"alice", "bob", "carol"}
