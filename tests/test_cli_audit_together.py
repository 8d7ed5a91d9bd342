"""``ucm audit verify`` of several ledgers: what each is, and what they are together."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner, Result

from support.ledger import ring, row
from support.ledgers import Facts, note, tamper, write_ledger
from ucm_middleware.audit import SQLiteLedger
from ucm_middleware.audit.verification.ledger_file import Quiet
from ucm_middleware.cli.app import make_app

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
NOBODY = bytes(16)


def body(number: int, event: str = "opened", *, context: int | None = None) -> bytes:
    members = {"event": event, "at": 1_700_000_000 + number, "outcome": "ok", "id": f"{number:032x}"}
    if context is not None:
        members["context"] = f"context_{context:032x}"
    return json.dumps(members).encode()


def worker(number: int, bodies: Sequence[bytes] | None = None) -> Facts:
    """The ledger of one worker: with a stream of its own, and records that nobody else has."""
    stream = f"stream_{number:032x}"
    entries = [body(1000 * number + n) for n in range(1, 11)] if bodies is None else bodies
    return Facts(tuple((NOBODY, entry) for entry in entries), stream)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the ledgers of four workers, a checkpoint over each, and the public keys."""
    for number in range(1, 5):
        write_ledger(tmp_path / f"{number}.db", worker(number))
    (tmp_path / "checkpoints").write_bytes(b"\n".join(note(worker(number), KEY) for number in range(1, 5)))
    for name, key in (("key", KEY), ("other", OTHER_KEY)):
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ("1.db", "2.db", "3.db", "4.db")
CHECKED = ("--checkpoints", "checkpoints", "--public-key", "key.pub")


def verify(*arguments: str, status: int) -> Result:
    result = CliRunner().invoke(make_app(), ["audit", "verify", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def problems(*arguments: str) -> list[str]:
    """What is wrong with them together; each by itself is good."""
    said = json.loads(verify(*arguments, "--json", status=1).stdout)
    assert not said["verified"]
    assert all(ledger["verified"] for ledger in said["ledgers"])
    found: list[str] = said["problems"]
    return found


def test_four_good_ledgers_are_told_one_by_one_and_together() -> None:
    lines = verify(*ALL, *CHECKED, status=0).stdout.splitlines()
    assert [line for line in lines if line.startswith("verified: ")] == [f"verified: {name}" for name in ALL]
    assert f"  10 records of {worker(3).stream}, plain" in lines
    assert "  from 2023-11-14T22:30:01+00:00 to 2023-11-14T22:30:10+00:00" in lines
    assert lines[-2:] == [
        "verified together: 4 of 4 ledgers (4 plain), 40 records",
        "  40 of the 40 records are as checkpoints said",
    ]


def test_as_json() -> None:
    said = json.loads(verify(*ALL, *CHECKED, "--json", status=0).stdout)
    ledgers = said.pop("ledgers")
    assert said == {"verified": True, "records": 40, "covered": 40, "problems": []}
    assert [ledger["ledger"] for ledger in ledgers] == list(ALL)
    assert ledgers[0]["checkpoints"] == 1
    assert (ledgers[0]["first"], ledgers[0]["last"]) == ("2023-11-14T22:30:01+00:00", "2023-11-14T22:30:10+00:00")


def test_one_that_was_changed_is_named(folder: Path) -> None:
    tamper(folder / "3.db", "UPDATE records SET body = x'00' WHERE sequence = 5")
    done = verify(*ALL, status=1)
    assert "NOT VERIFIED: 3.db\n  record 5: its hash is not that of its content" in done.stdout
    assert "NOT VERIFIED TOGETHER: 3 of 4 ledgers (3 plain), 30 records" in done.stdout
    assert done.stdout.count("\nverified: ") == 2  # and the first line


def test_one_that_cannot_be_read_does_not_keep_the_others_from_being_verified(folder: Path) -> None:
    (folder / "2.db").write_bytes(b"no ledger")
    done = verify(*ALL, "5.db", status=2)
    assert "COULD NOT BE VERIFIED: 2.db: is not an SQLite database" in done.stdout
    assert "COULD NOT BE VERIFIED: 5.db: does not exist" in done.stdout
    assert "NOT VERIFIED TOGETHER: 3 of 5 ledgers" in done.stdout
    said = json.loads(verify(*ALL, "--json", status=2).stdout)
    assert said["ledgers"][1] == {
        "ledger": "2.db",
        "verified": False,
        "error": "2.db: is not an SQLite database; give the file of a ledger",
    }


def test_something_wrong_weighs_more_than_something_unreadable(folder: Path) -> None:
    (folder / "2.db").write_bytes(b"no ledger")
    tamper(folder / "3.db", "DELETE FROM records WHERE sequence = 5")
    verify(*ALL, status=1)


def test_one_without_records_is_a_worker_that_served_nobody(folder: Path) -> None:
    write_ledger(folder / "4.db", worker(4, []))
    done = verify(*ALL, status=0)
    assert f"  0 records of {worker(4).stream}, plain" in done.stdout
    assert "verified together: 4 of 4 ledgers (4 plain), 30 records" in done.stdout


# Checkpoints and what is missing


def test_checkpoints_of_each_machine_under_a_key_of_its_own(folder: Path) -> None:
    (folder / "one").write_bytes(note(worker(1), KEY) + b"\n" + note(worker(2).first(4), KEY))
    (folder / "two").write_bytes(note(worker(3), OTHER_KEY))
    options = ("--checkpoints", "one", "--checkpoints", "two", "--public-key", "key.pub")
    assert "checkpoint 1 was not signed with this key" in verify(*ALL, *options, status=2).stderr
    done = verify(*ALL, *options, "--public-key", "other.pub", status=0)
    assert "as 1 checkpoint said, up to record 4; the 6 after it are behind no checkpoint" in done.stdout
    assert done.stdout.count("no checkpoint was given") == 1
    assert "24 of the 40 records are as checkpoints said" in done.stdout


def test_each_ledger_has_a_file_of_checkpoints_of_its_own(folder: Path) -> None:
    ucm = partial(CliRunner().invoke, make_app())
    assert ucm(["audit", "keygen", "mine"]).exit_code == 0
    for number in ("1", "2"):
        done = ucm(["audit", "checkpoint", f"{number}.db", "--key", "mine", "--to", f"{number}.checkpoints"])
        assert done.exit_code == 0, done.output
    given = ("--checkpoints", "1.checkpoints", "--checkpoints", "2.checkpoints", "--public-key", "mine.pub")
    done = verify("1.db", "2.db", *given, "--expect", "2", status=0)
    assert "20 of the 20 records are as checkpoints said" in done.stdout
    refused = ucm(["audit", "checkpoint", "2.db", "--key", "mine", "--to", "1.checkpoints"])
    assert refused.exit_code == 1
    assert "a file has the checkpoints of one ledger" in " ".join(refused.output.split())


def test_a_tail_that_was_cut_off_is_found_behind_its_checkpoint(folder: Path) -> None:
    write_ledger(folder / "2.db", worker(2).first(8))
    verify(*ALL, status=0)
    done = verify(*ALL, *CHECKED, status=1)
    assert "NOT VERIFIED: 2.db\n  record 9: it is missing: there is a checkpoint over 10 records" in done.stdout


def test_a_ledger_that_was_not_handed_in_is_named() -> None:
    stream = worker(3).stream
    missing = f"{stream} is missing: there is a checkpoint over 10 records, and no ledger here is that stream"
    assert problems("1.db", "2.db", "4.db", *CHECKED) == [missing]
    assert problems("1.db", "2.db", "4.db", "--expect", "4") == ["4 streams are expected, and 3 are here"]
    verify(*ALL, "--expect", "4", status=0)
    assert problems("1.db", "--expect", "2") == ["2 streams are expected, and 1 are here"]


def test_a_ledger_that_was_replaced_by_another_stream_is_missed(folder: Path) -> None:
    write_ledger(folder / "3.db", replace(worker(3), stream="stream_" + "f" * 32))
    [missing] = problems(*ALL, *CHECKED)
    assert missing.startswith(f"{worker(3).stream} is missing")


# What two have in common


def test_the_same_ledger_twice(folder: Path) -> None:
    stream = worker(1).stream
    same = f"{stream}: the same 10 records, so that one is a copy, or was handed in twice"
    assert problems("1.db", "1.db") == [f"1.db and 1.db are both {same}"]
    (folder / "copy.db").write_bytes((folder / "1.db").read_bytes())
    assert problems(*ALL, "copy.db", *CHECKED) == [f"1.db and copy.db are both {same}"]
    assert problems(*ALL, "copy.db", "--expect", "5")[1:] == ["5 streams are expected, and 4 are here"]


@pytest.mark.parametrize("names", [("1.db", "old.db"), ("old.db", "1.db")])
def test_an_older_copy(folder: Path, names: tuple[str, str]) -> None:
    write_ledger(folder / "old.db", worker(1).first(7))
    [said] = problems(*names)
    assert said.endswith(
        "old.db has the first 7 records of 1.db and no more, so that it is an older copy, or was cut off"
    )


def test_a_fork_names_the_record_where_it_begins(folder: Path) -> None:
    forked = worker(1, [*(entry for _, entry in worker(1).entries[:6]), body(5000), body(5001)])
    write_ledger(folder / "fork.db", forked)
    assert problems("1.db", "fork.db", "2.db") == [
        (
            f"1.db and fork.db are both {forked.stream}: a fork, for they have the first 6 records in common and "
            "differ from record 7 on"
        )
    ]


def test_a_ledger_copied_under_another_name_of_its_stream(folder: Path) -> None:
    """All hashes are others: the records are what tells, and their contexts tell no more."""
    one = worker(1, [body(n, context=n) for n in range(1, 11)])
    write_ledger(folder / "1.db", one)
    write_ledger(folder / "2.db", replace(one, stream=worker(2).stream))
    assert problems(*ALL) == ["10 records are in several ledgers, the first as record 1 of 1.db and record 1 of 2.db"]


def test_a_record_in_three_ledgers(folder: Path) -> None:
    for number in (2, 3):
        known = worker(number)
        write_ledger(folder / f"{number}.db", replace(known, entries=(*known.entries, (NOBODY, body(1004, "closed")))))
    assert problems(*ALL) == [
        "a record is in several ledgers: record 4 of 1.db and record 11 of 2.db and record 11 of 3.db"
    ]


def test_a_context_that_was_opened_here_and_closed_there(folder: Path) -> None:
    rule = "a context lives in one process, and is on record in its ledger alone"
    write_ledger(folder / "1.db", worker(1, [body(1, context=71), body(2, context=72), body(3, "closed", context=71)]))
    write_ledger(folder / "2.db", worker(2, [body(4, context=73), body(5, "closed", context=72)]))
    assert problems("1.db", "2.db") == [
        f"a context was opened in 1.db (record 2) and closed in 2.db (record 2): {rule}"
    ]
    write_ledger(folder / "3.db", worker(3, [body(6, "child_opened", context=80), body(7, "answered", context=71)]))
    write_ledger(folder / "4.db", worker(4, [body(8, "closed", context=80)]))
    verify("1.db", "3.db", status=0)  # what is told of a context elsewhere is not its beginning and not its end
    assert problems("3.db", "4.db") == [
        f"a context was opened in 3.db (record 1) and closed in 4.db (record 1): {rule}"
    ]


def test_several_contexts_of_the_same_two_ledgers_are_told_together(folder: Path) -> None:
    write_ledger(folder / "1.db", worker(1, [body(n, context=n) for n in range(1, 6)]))
    write_ledger(folder / "2.db", worker(2, [body(100 + n, "closed", context=n) for n in range(1, 6)]))
    [said] = problems("1.db", "2.db")
    assert said.startswith("5 contexts are in several ledgers, the first opened in 1.db (record 1) and closed in 2.db")


def test_a_sealed_record_in_two_ledgers(folder: Path) -> None:
    """Its id is sealed; its bytes are nobody else's."""
    streams = ("one", "two")
    for name in streams:
        with closing(SQLiteLedger(f"{name}.db", keys=f"{name}-keys.db")) as ledger:
            ledger.start(ring())
            for number in (1, 2, 3):  # the same records, for all that their ids say
                ledger.append(row("alice", number))
            ledger.flush()
    done = verify("one.db", "two.db", status=0)
    assert "2 of 2 ledgers (2 sealed), 6 records" in done.stdout
    assert "of sealed records, ids and contexts cannot be compared" in done.stdout
    stolen = replace(worker(9, []), sealed=1)
    write_ledger(folder / "nine.db", replace(stolen, entries=(entries_of(folder / "one.db")[1],)))
    assert problems("one.db", "nine.db") == [
        "a record is in several ledgers: record 2 of one.db and record 1 of nine.db"
    ]


def entries_of(path: Path) -> list[tuple[bytes, bytes]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT subject, body FROM records ORDER BY sequence").fetchall()


STRANGE = (
    b"",
    b"no JSON",
    b"\xff\xfe\x00",
    b"[1]",
    b"[" * 100_000,
    b'{"id":{}}',
    b'{"id":"\\ud800"}',
    b'{"at":1e400}',
    b'{"at":NaN}',
    b'{"at":' + b"9" * 400 + b"}",
    b'{"at":true,"event":"opened","context":""}',
    b'{"event":["opened"],"context":5}',
)


@pytest.mark.parametrize("strange", STRANGE, ids=[body[:20].decode(errors="replace") for body in STRANGE])
def test_strange_bodies_are_compared_all_the_same(folder: Path, strange: bytes) -> None:
    write_ledger(folder / "1.db", worker(1, [strange, body(1)]))
    write_ledger(folder / "2.db", worker(2, [body(2)]))
    verify("1.db", "2.db", status=0)


def test_a_record_that_is_bad_in_its_own_ledger_is_not_compared(folder: Path) -> None:
    tamper(folder / "3.db", "UPDATE records SET body = ? WHERE sequence = 5", values=(body(1004),))
    said = json.loads(verify(*ALL, "--json", status=1).stdout)
    assert said["ledgers"][2]["problems"][0]["record"] == 5
    assert said["problems"] == []


def test_a_ledger_that_is_read_anew_since_somebody_wrote_to_it_is_compared_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quiet, "still", lambda quiet: False)
    (folder / "copy.db").write_bytes((folder / "1.db").read_bytes())
    [said] = problems("1.db", "copy.db")
    assert "the same 10 records" in said


def test_a_ledger_in_use(folder: Path) -> None:
    with closing(SQLiteLedger("live.db", keys=None)) as ledger:
        ledger.start(ring())
        ledger.append(row("alice", 1))
        ledger.flush()
        verify("live.db", "1.db", status=0)
