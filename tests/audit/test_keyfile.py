"""Which files are taken for the key file of a ledger: what is said of the others, and that they stay as they are."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import ucm_middleware
from support.keyfiles import OTHER, SECRET, STREAM, content_of, hkdf, ring, rows_of
from ucm_middleware import ConfigurationError, IsolatedEnvironment, LedgerFileError
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.secret import Secret, SecretRing

pytestmark = pytest.mark.security


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def filled(path: Path) -> Path:
    with closing(Vault.open(path, STREAM, ring())) as vault:
        vault.of(["alice", "bob"])
    return path


def refusal(path: Path, stream: str = STREAM, *, must_exist: bool = False, secrets: SecretRing | None = None) -> str:
    with pytest.raises(LedgerFileError) as caught:
        Vault.open(path, stream, secrets or ring(), must_exist=must_exist)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_a_new_one_is_its_owners_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        with closing(Vault.open(path, STREAM, ring())) as vault:
            vault.of(["alice"])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"keys.db": 0o600, "keys.db-wal": 0o600, "keys.db-shm": 0o600}


def test_two_new_ones_have_nothing_in_common(tmp_path: Path) -> None:
    for name in ("one.db", "two.db"):
        with closing(Vault.open(tmp_path / name, STREAM, ring())) as vault:
            vault.of(["alice"])
    one, two = (rows_of(tmp_path / name)["alice"] for name in ("one.db", "two.db"))
    assert one.traces_in(content_of(tmp_path / "two.db")) == set()
    assert one.token != two.token


def a_directory(path: Path) -> None:
    path.mkdir()


def text(path: Path) -> None:
    path.write_text("This is a text of more than a hundred characters, " * 40)


def short_text(path: Path) -> None:
    path.write_text("short")


def an_empty_file(path: Path) -> None:
    path.touch()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _database(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in (*statements, "CREATE TABLE things (id INTEGER)"):
            connection.execute(statement)


def without_an_application(path: Path) -> None:
    _database(path)


def of_another_program(path: Path) -> None:
    _database(path, "PRAGMA journal_mode = WAL", f"PRAGMA application_id = {0x0F055112}", "PRAGMA user_version = 1")


def a_ledger(path: Path) -> None:
    _database(path, "PRAGMA journal_mode = WAL", f"PRAGMA application_id = {0x55434D4C}", "PRAGMA user_version = 1")


def of_a_newer_format(path: Path) -> None:
    _database(path, f"PRAGMA application_id = {0x55434D4B}", "PRAGMA user_version = 2")


WRONG: dict[Callable[[Path], None], tuple[str, str]] = {
    a_directory: ("is a directory, where a key file belongs", "name a file"),
    text: ("is no SQLite database", "name another file"),
    short_text: ("is no SQLite database", "name another file"),
    an_empty_file: ("is empty, where a key file belongs", "delete it, or name another file"),
    a_pipe: ("is no ordinary file", "name another file"),
    without_an_application: ("is another program's database (application_id 0x00000000)", "name another file"),
    of_another_program: ("is another program's database (application_id 0x0f055112)", "name another file"),
    a_ledger: ("is a ledger, where a key file belongs", "name another file"),
    of_a_newer_format: (
        "is a key file of format 2, and this version of ucm-middleware knows format 1",
        "use the version",
    ),
}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else b"") for file in folder.iterdir()
    }


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
@pytest.mark.parametrize("must_exist", [False, True])
def test_a_wrong_file_is_named_and_left_alone(
    make: Callable[[Path], None], must_exist: bool, path: Path, tmp_path: Path
) -> None:
    make(path)
    before = state_of(tmp_path)
    said = refusal(path, must_exist=must_exist)
    assert all(part in said for part in WRONG[make])
    assert state_of(tmp_path) == before


def test_the_key_file_of_another_ledger(filled: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    other = STREAM[::-1]
    assert f"belongs to the ledger {STREAM}, and not to {other}; name the key file of this" in refusal(filled, other)
    assert state_of(tmp_path) == before


def test_one_under_another_secret(filled: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    said = refusal(filled, secrets=ring(OTHER))
    made_under, here = Secret(SECRET).fingerprint, Secret(OTHER).fingerprint
    assert f"with the fingerprint {made_under}, and here are only {here}" in said
    assert "UCM_SECRET, or in UCM_SECRET_PREVIOUS" in said
    assert SECRET.decode() not in said
    assert OTHER.decode() not in said
    assert state_of(tmp_path) == before


def test_a_missing_one_that_a_ledger_needs(path: Path, tmp_path: Path) -> None:
    assert "does not exist, and the ledger has records that nothing else opens; restore it" in refusal(
        path, must_exist=True
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder(tmp_path: Path) -> None:
    for must_exist in (False, True):
        refusal(tmp_path / "no such folder" / "keys.db", must_exist=must_exist)
    (tmp_path / "file").touch()
    for must_exist in (False, True):
        refusal(tmp_path / "file" / "keys.db", must_exist=must_exist)


def test_in_production_it_takes_a_secret(path: Path, tmp_path: Path) -> None:
    nothing = SecretRing.from_settings(None, None, IsolatedEnvironment(environ={"UCM_ENVIRONMENT": "production"}))
    with pytest.raises(ConfigurationError, match="UCM_SECRET is not set, and encrypted audit records must have it"):
        Vault.open(path, STREAM, nothing)
    assert list(tmp_path.iterdir()) == []


class TestDamage:
    @pytest.fixture
    def connection(self, filled: Path) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(filled, isolation_level=None)) as connection:
            yield connection

    def test_the_master_key_is_altered(self, filled: Path, connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE vault SET master = zeroblob(60)")
        assert "its master key was altered; restore it from a backup, and erase again whoever" in refusal(filled)

    def test_the_master_key_is_missing(self, filled: Path, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM vault")
        assert "its master key is missing" in refusal(filled)

    def test_a_table_is_missing(self, filled: Path, connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE vault")
        assert "no such table: vault" in refusal(filled)

    @pytest.mark.parametrize(
        "damage",
        [
            "UPDATE subjects SET sealed = zeroblob(60)",
            "UPDATE subjects SET sealed = x'00'",
            "UPDATE subjects SET subject = randomblob(16)",
            "DELETE FROM subjects WHERE lookup = :alice; UPDATE subjects SET lookup = :alice",
        ],
    )
    def test_a_row_is_altered(self, filled: Path, connection: sqlite3.Connection, damage: str) -> None:
        """Also where it is whole and stands in another user's place. And no error carries a key."""
        rows = rows_of(filled)
        connection.executescript(damage.replace(":alice", f"x'{rows['alice'].lookup.hex()}'"))
        with closing(Vault.open(filled, STREAM, ring())) as vault:
            with pytest.raises(
                LedgerFileError, match=r"is damaged: the row of subject [0-9a-f]{32} was altered"
            ) as caught:
                vault.of(["alice"])
            assert caught.value.__context__ is None
        package = str(Path(ucm_middleware.__file__).parent)
        frames = [entry.frame for entry in caught.traceback if str(entry.path).startswith(package)]
        assert len(frames) >= 2
        shown = [repr(value) for frame in frames for name, value in frame.f_locals.items() if name != "secret"]
        with closing(sqlite3.connect(filled)) as reading:
            [(sealed,)] = reading.execute("SELECT master FROM vault")
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        master = AESGCM(hkdf(SECRET, "audit vault")).decrypt(sealed[:12], sealed[12:], None)
        keys = [SECRET, master, hkdf(master, "subjects"), hkdf(master, "lookup"), *[row.key for row in rows.values()]]
        for key in keys:
            assert repr(key)[2:-1] not in "\n".join(shown)

    def test_the_file_is_cut_off(self, filled: Path) -> None:
        os.truncate(filled, 2 * 4096)
        assert "is damaged; restore it from a backup" in refusal(filled)


# In a process of its own, which gives up the rights of root where it has them, and after that can import nothing more.
PRELUDE = """
import os, sys
from contextlib import closing
from pathlib import Path
import cryptography.exceptions
import cryptography.hazmat.primitives.hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from support.keyfiles import OTHER, SECRET, STREAM, ring
from ucm_middleware import LedgerFileError
from ucm_middleware.audit.subjects import Vault

if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
path = Path(sys.argv[1])

def refused(use):
    try:
        use()
    except LedgerFileError as error:
        return str(error)
    raise AssertionError("it was written to")
"""

READ_ONLY = """
for secrets in (ring(), ring(OTHER, SECRET)):
    with closing(Vault.open(path, STREAM, secrets, must_exist=True)) as vault:
        alice = vault.of(["alice"])["alice"]
        assert vault.name_of(alice.token) == "alice"
        for use in (lambda: vault.of(["carol"]), lambda: vault.bind({"bob": "alice"}), lambda: vault.erase("alice")):
            said = refused(use)
            assert "can only be read, and something was to be written to it; make it and its folder" in said, said
        assert vault.find("carol") is None
        assert vault.find("alice") is not None
if sys.argv[2] == "folder":
    said = refused(lambda: Vault.open(path.with_name("new.db"), STREAM, ring()))
    assert "cannot be made: Permission denied; name a file in a folder" in said, said
print(sorted(os.listdir(path.parent)))
"""


NO_ACCESS = """
for must_exist in (False, True):
    said = refused(lambda: Vault.open(path, STREAM, ring(), must_exist=must_exist))
    assert said.startswith(f"{path}: ") and sys.argv[2] in said, said
"""


def without_rights(script: str, *arguments: str) -> str:
    folders = [str(Path(__file__).parents[1]), str(Path(ucm_middleware.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *arguments],
        # Not measured: without its rights it could not write down what was run.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
            "PYTHONPATH": os.pathsep.join(folders),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user of the machine gets to, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def give_away(path: Path, mode: int) -> None:
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    path.chmod(mode)


# Where only the folder cannot be written to, and the file is open elsewhere, it can be written to.
@pytest.mark.parametrize(
    ("what", "while_open"), [("folder", False), ("file", False), ("file", True), ("both", False), ("both", True)]
)
def test_one_that_can_only_be_read(what: str, while_open: bool, folder: Path) -> None:
    """Whoever is in it can be read; everything else is refused. Also while others write."""
    path = folder / "keys.db"
    with closing(Vault.open(path, STREAM, ring())) as vault:
        vault.of(["alice", "bob"])
        if not while_open:
            vault.close()
        before = sorted(os.listdir(folder))
        for file in folder.iterdir():
            give_away(file, 0o600 if what == "folder" else 0o400)
        give_away(folder, 0o700 if what == "file" else 0o500)
        assert without_rights(READ_ONLY, str(path), "file" if what == "file" else "folder") == f"{before}\n"
        folder.chmod(0o700)
    with closing(Vault.open(path, STREAM, ring())) as again:
        assert again.find("alice") is not None


def test_one_that_cannot_be_read(folder: Path) -> None:
    path = folder / "keys.db"
    Vault.open(path, STREAM, ring()).close()
    give_away(path, 0o000)
    without_rights(NO_ACCESS, str(path), "cannot be opened; see that")
    give_away(folder, 0o000)
    without_rights(NO_ACCESS, str(path), "cannot be reached: Permission denied; give this process access to its folder")
