"""``ucm audit``: what it says, how it ends, and that it changes nothing but what it was asked to."""

import json
import os
import pty
import re
import shlex
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner, Result

from support.ledgers import append_entries, facts, files_in, note, some_entries, tamper, write_ledger
from ucm_middleware.cli.app import make_app

UCM = str(Path(sys.executable).with_name("ucm"))
TWELVE = facts(12)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a ledger, checkpoints over 7 and over 12 of its records, and keys."""
    write_ledger(tmp_path / "ledger.db", TWELVE)
    (tmp_path / "checkpoints").write_bytes(note(TWELVE.first(7), KEY) + b"\n" + note(TWELVE, KEY))
    for name, key in (("key", KEY), ("other", OTHER_KEY)):
        (tmp_path / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ucm(*arguments: str) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def installed_ucm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as it is installed."""
    return subprocess.run([UCM, *arguments], capture_output=True, text=True, timeout=60, check=False)


CHECKED = ("--checkpoints", "checkpoints", "--public-key", "key.pub")


# verify


def test_a_good_ledger(folder: Path) -> None:
    before = files_in(folder)
    done = installed_ucm("audit", "verify", "ledger.db", *CHECKED)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "verified: ledger.db",
        f"  12 records of {TWELVE.stream}, plain",
        f"  root {b64encode(TWELVE.root).decode()}",
        "  as 2 checkpoints said, up to the last record",
    ]
    assert files_in(folder) == before


def test_without_a_checkpoint_it_says_what_cannot_be_seen(folder: Path) -> None:
    done = ucm("audit", "verify", "ledger.db")
    assert done.exit_code == 0
    assert "no checkpoint was given: that records were cut off at the end, or that the whole was" in done.stdout


def test_what_no_checkpoint_covers_is_said(folder: Path) -> None:
    (folder / "checkpoints").write_bytes(note(TWELVE.first(7), KEY))
    done = ucm("audit", "verify", "ledger.db", *CHECKED)
    assert done.exit_code == 0
    assert "as 1 checkpoint said, up to record 7; the 5 after it are behind no checkpoint" in done.stdout


def test_a_ledger_without_records_has_nothing_to_verify(folder: Path) -> None:
    write_ledger(folder / "ledger.db", facts(0, sealed=1))
    done = ucm("audit", "verify", "ledger.db")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "has no records yet" in done.stderr


def test_a_bad_ledger(folder: Path) -> None:
    tamper(folder / "ledger.db", "UPDATE records SET body = x'00' WHERE sequence = 5")
    before = files_in(folder)
    done = installed_ucm("audit", "verify", "ledger.db")
    assert done.returncode == 1
    assert done.stdout.startswith("NOT VERIFIED: ledger.db\n  record 5: its hash is not that of its content")
    assert files_in(folder) == before


def test_a_truncated_ledger_is_bad_behind_a_checkpoint(folder: Path) -> None:
    write_ledger(folder / "ledger.db", TWELVE.first(10))
    assert installed_ucm("audit", "verify", "ledger.db").returncode == 0
    done = installed_ucm("audit", "verify", "ledger.db", *CHECKED)
    assert done.returncode == 1
    assert "record 11: it is missing: there is a checkpoint over 12 records" in done.stdout


def test_another_ledger_in_its_place_is_bad(folder: Path) -> None:
    write_ledger(folder / "ledger.db", replace(TWELVE, stream="stream_" + "a" * 32))
    done = ucm("audit", "verify", "ledger.db", *CHECKED)
    assert done.exit_code == 1
    assert "is of another ledger" in done.stdout


def test_as_json(folder: Path) -> None:
    done = ucm("audit", "verify", "ledger.db", "--json", *CHECKED)
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "ledger": "ledger.db",
        "verified": True,
        "stream": TWELVE.stream,
        "sealed": False,
        "records": 12,
        "root": b64encode(TWELVE.root).decode(),
        "checkpoints": 2,
        "covered": 12,
        "problems": [],
    }
    tamper(folder / "ledger.db", "DELETE FROM records WHERE sequence = 9")
    done = ucm("audit", "verify", "ledger.db", "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert (said["verified"], said["records"], said["problems"][0]["record"]) == (False, 8, 9)
    done = ucm("audit", "verify", "nothing.db", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout) == {"error": "nothing.db: does not exist; give the file of a ledger"}


def another_program(folder: Path) -> None:
    (folder / "ledger.db").unlink()
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        connection.execute("CREATE TABLE notes (text)")


Prepare = Callable[[Path], object]

NOT_CHECKED: dict[str, tuple[Prepare, tuple[str, ...], str]] = {
    "nothing": (lambda _: None, ("nothing.db",), "nothing.db: does not exist"),
    "a directory": (lambda folder: (folder / "sub").mkdir(), ("sub",), "sub: is a directory"),
    "another program's file": (another_program, ("ledger.db",), "but not a ledger"),
    "text": (lambda folder: (folder / "text").write_text("hello\n"), ("text",), "text: is not an SQLite database"),
    "a newer format": (
        lambda folder: tamper(folder / "ledger.db", "PRAGMA user_version = 2"),
        ("ledger.db",),
        "format 2, and this version reads format 1; upgrade ucm-middleware",
    ),
    "another key": (
        lambda _: None,
        ("ledger.db", "--checkpoints", "checkpoints", "--public-key", "other.pub"),
        "checkpoints: checkpoint 1 was not signed with this key",
    ),
    "the private key": (
        lambda _: None,
        ("ledger.db", "--checkpoints", "checkpoints", "--public-key", "key"),
        "key: is not a public key",
    ),
    "a changed checkpoint": (
        lambda folder: (folder / "checkpoints").write_bytes(note(TWELVE, KEY).replace(b"\n12\n", b"\n11\n")),
        ("ledger.db", *CHECKED),
        "checkpoint 1 is not what was signed",
    ),
    "no checkpoints": (
        lambda folder: (folder / "checkpoints").write_bytes(b""),
        ("ledger.db", *CHECKED),
        "checkpoints: has no checkpoints",
    ),
    "the ledger as checkpoints": (
        lambda _: None,
        ("ledger.db", "--checkpoints", "ledger.db", "--public-key", "key.pub"),
        "no checkpoint in the right form at line 1",
    ),
    "checkpoints without a key": (
        lambda _: None,
        ("ledger.db", "--checkpoints", "checkpoints"),
        "--checkpoints and --public-key go together",
    ),
    "a key without checkpoints": (lambda _: None, ("ledger.db", "--public-key", "key.pub"), "go together"),
    "no ledger": (lambda _: None, (), "Missing argument"),
    "an unknown option": (lambda _: None, ("ledger.db", "--fix"), "No such option"),
}


@pytest.mark.parametrize("what", NOT_CHECKED)
def test_what_could_not_be_verified_ends_with_2_and_a_message(folder: Path, what: str) -> None:
    prepare, arguments, words = NOT_CHECKED[what]
    prepare(folder)
    before = files_in(folder)
    done = ucm("audit", "verify", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert files_in(folder) == before


def test_what_could_not_be_verified_when_installed(folder: Path) -> None:
    done = installed_ucm("audit", "verify", "nothing.db")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing.db: does not exist; give the file of a ledger\n"


def test_a_path_is_shown_as_it_is(folder: Path) -> None:
    name = "[bold]" + "a long name " * 15 + ":smile:"
    done = ucm("audit", "verify", name)
    assert done.stderr == f"error: {name}: does not exist; give the file of a ledger\n"


def test_a_bar_is_drawn_for_whoever_looks(folder: Path) -> None:
    write_ledger(folder / "ledger.db", facts(20_000))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [UCM, "audit", "verify", "ledger.db"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        drawn = b""
        with suppress(OSError):  # which is how the end of a terminal reads
            while chunk := os.read(ours, 4096):
                drawn += chunk
        os.close(ours)
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0
    assert b"20000/20000" in drawn or b"database" in drawn
    assert said.startswith(b"verified: ledger.db\n")
    assert b"\x1b" not in said


# keygen and checkpoint


def test_from_keys_to_evidence(folder: Path) -> None:
    assert installed_ucm("audit", "keygen", "mine").returncode == 0
    assert (folder / "mine").stat().st_mode & 0o777 == 0o600
    first = installed_ucm("audit", "checkpoint", "ledger.db", "--key", "mine", "--to", "kept")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"signed: 12 records of {TWELVE.stream}, in kept\n"
    with closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as writer:
        append_entries(writer, TWELVE, some_entries(3))
        assert installed_ucm("audit", "checkpoint", "ledger.db", "--key", "mine", "--to", "kept").returncode == 0
    done = installed_ucm("audit", "verify", "ledger.db", "--checkpoints", "kept", "--public-key", "mine.pub")
    assert done.returncode == 0
    assert "as 2 checkpoints said, up to the last record" in done.stdout
    assert "15 records" in done.stdout


def test_a_checkpoint_changes_only_the_file_of_checkpoints(folder: Path) -> None:
    (folder / "checkpoints").write_bytes(note(TWELVE.first(7), KEY))
    before = files_in(folder)
    assert ucm("audit", "checkpoint", "ledger.db", "--key", "key", "--to", "checkpoints").exit_code == 0
    both = note(TWELVE.first(7), KEY) + b"\n" + note(TWELVE, KEY)
    assert files_in(folder) == {**before, "checkpoints": both}


def test_nothing_new_is_not_signed_again(folder: Path) -> None:
    before = files_in(folder)
    done = ucm("audit", "checkpoint", "ledger.db", "--key", "key", "--to", "checkpoints")
    assert done.exit_code == 0
    assert done.stdout == "nothing to sign: the last checkpoint is over all 12 records\n"
    assert files_in(folder) == before


NOT_SIGNED: dict[str, tuple[Prepare, tuple[str, ...], int, str]] = {
    "a bad ledger": (
        lambda folder: tamper(folder / "ledger.db", "UPDATE records SET body = x'00' WHERE sequence = 5"),
        ("ledger.db", "--key", "key", "--to", "new"),
        1,
        "NOT VERIFIED: ledger.db\n  record 5: ",
    ),
    "one that was rewritten since": (
        lambda folder: write_ledger(
            folder / "ledger.db", replace(TWELVE, entries=(*TWELVE.entries[:11], *some_entries(2)))
        ),
        ("ledger.db", "--key", "key", "--to", "checkpoints"),
        1,
        "record 8: one of the records 8 to 12 is not what it was",
    ),
    "checkpoints of another key": (
        lambda _: None,
        ("ledger.db", "--key", "other", "--to", "checkpoints"),
        2,
        "checkpoint 1 was not signed with this key",
    ),
    "the public key": (lambda _: None, ("ledger.db", "--key", "key.pub", "--to", "new"), 2, "not a private key"),
    "into the ledger": (lambda _: None, ("ledger.db", "--key", "key", "--to", "ledger.db"), 2, "no checkpoint"),
    "into the key": (lambda _: None, ("ledger.db", "--key", "key", "--to", "key"), 2, "no checkpoint"),
    "nowhere": (lambda _: None, ("ledger.db", "--key", "key", "--to", "no/where"), 2, "cannot be written to"),
    "no ledger": (lambda _: None, ("nothing.db", "--key", "key", "--to", "new"), 2, "does not exist"),
    "no key": (lambda _: None, ("ledger.db", "--to", "new"), 2, "Missing option"),
}


@pytest.mark.parametrize("what", NOT_SIGNED)
def test_what_is_not_good_is_not_signed(folder: Path, what: str) -> None:
    prepare, arguments, code, words = NOT_SIGNED[what]
    prepare(folder)
    before = files_in(folder)
    done = ucm("audit", "checkpoint", *arguments)
    assert done.exit_code == code
    assert words in (done.stdout if code == 1 else done.stderr)
    assert files_in(folder) == before


def test_a_key_is_not_overwritten(folder: Path) -> None:
    before = files_in(folder)
    done = ucm("audit", "keygen", "key")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "key: is there already" in done.stderr
    assert files_in(folder) == before


# The command itself


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(tmp_path: Path, missing: str) -> None:
    (tmp_path / "without.py").write_text(
        f"import sys\nsys.modules[{missing!r}] = None\nfrom ucm_middleware.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "without.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ucm needs {missing}, which is not installed: pip install 'ucm-middleware[audit]'\n"


def test_help_names_the_commands() -> None:
    done = installed_ucm("audit", "--help")
    assert done.returncode == 0
    for name in ("verify", "checkpoint", "keygen"):
        assert name in done.stdout


def test_the_guide_is_what_it_says(folder: Path) -> None:
    guide = Path(__file__).parents[1] / "docs" / "how-to" / "verify-the-audit-trail.md"
    blocks = re.findall(r"```sh\n(.*?)\n```", guide.read_text(), re.DOTALL)
    commands = [command for block in blocks for command in block.splitlines()]
    assert len(commands) == 6
    (folder / "checkpoints").unlink()
    write_ledger(folder / "a.db", TWELVE)
    entries = tuple(some_entries(15)[12:])
    write_ledger(folder / "b.db", replace(TWELVE, stream=f"stream_{1:032x}", entries=entries))
    said: list[list[str]] = []
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "ucm"
        done = installed_ucm(*arguments)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[2][3] == "  as 1 checkpoint said, up to the last record"
    assert said[2][3] in guide.read_text()
    assert said[5][-2].startswith("verified together: 2 of 2 ledgers (2 plain), ")
    assert said[5][-2].partition(", ")[0] in guide.read_text()
