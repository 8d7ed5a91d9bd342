"""Each byte of a ledger, and any number of them: damage is found, or every record still reads as it was written."""

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.ledgers import ALICE, BOB, CAROL, Entry, Facts, facts, tamper, write_ledger
from ucm_middleware.audit.verification import Checkpoint, verify_ledger
from ucm_middleware.errors import LedgerFileError

TWELVE = facts(12)
WHOLE = Checkpoint(TWELVE.stream, 12, TWELVE.root)
PAGE = 512

with_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_ledger(tmp_path / "ledger.db", TWELVE, page_size=PAGE)


def is_accepted(path: Path, *checkpoints: Checkpoint) -> bool:
    """Whether it verifies; anything but a result or a refusal in words fails the test."""
    try:
        return verify_ledger(path, checkpoints).is_verified
    except LedgerFileError:
        return False


def reads_identical(path: Path, ledger: Facts) -> bool:
    """Whether all records come out as they were written, through the table and through the index by subject."""
    rows = ledger.rows()
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        table = connection.execute("SELECT * FROM records NOT INDEXED ORDER BY sequence").fetchall()
        trails = {
            subject: connection.execute(
                "SELECT sequence, subject, body, hash FROM records INDEXED BY records_by_subject "
                "WHERE sequence >> 10 = 0 AND subject = ? ORDER BY sequence",
                (subject,),
            ).fetchall()
            for subject in (ALICE, BOB, CAROL)
        }
    return table == rows and trails == {user: [row for row in rows if row[1] == user] for user in trails}


@pytest.mark.parametrize("pattern", [0xFF, 0x01])
def test_each_byte_flipped_is_found_or_every_record_reads_identical(path: Path, pattern: int) -> None:
    original = path.read_bytes()
    assert reads_identical(path, TWELVE)
    accepted = list[int]()
    damaged = bytearray(original)
    for position in range(len(original)):
        damaged[position] ^= pattern
        path.write_bytes(damaged)
        if is_accepted(path):
            accepted.append(position)
            assert reads_identical(path, TWELVE), f"byte {position} of {len(original)}"
        damaged[position] ^= pattern
    # What does not matter is free space and some of the header's fields; what records are made of is found.
    occupied = sum(len(subject) + len(body) + 32 for subject, body in TWELVE.entries)
    assert len(original) - len(accepted) > occupied
    body = original.index(TWELVE.entries[6][1])
    assert not any(position in range(body, body + 20) for position in accepted)


def test_a_ledger_cut_short_is_found(path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert not is_accepted(path)


def test_a_record_that_claims_to_be_endless_is_found(path: Path) -> None:
    # Lengths for which SQLite has only "out of memory"; libFuzzer found them.
    content = path.read_bytes()
    subject, body = TWELVE.entries[5]
    cell = content.index(subject + body) - 7  # its length, its number, and a header of five bytes
    path.write_bytes(content[:cell] + b"\xa3\xaf\xb0\xb0" + b"\xff" * 10 + content[cell + 14 :])
    problem = verify_ledger(path).problems[0]
    assert (problem.record, "it cannot be read" in problem.message) == (6, True)


Mutation = Callable[[bytearray, random.Random], None]


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start : start + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(1, 64))


def number(content: bytearray, chance: random.Random) -> None:
    """Numbers of pages, cells and lengths are where SQLite could be led astray."""
    start = chance.randrange(len(content) // PAGE) * PAGE + chance.choice([0, 3, 5, 8, 10, 28, 32, 100, 103, 105, 508])
    content[start : start + 4] = chance.randrange(len(content) // PAGE + 2).to_bytes(4, "big")


def exchange(content: bytearray, chance: random.Random) -> None:
    one, other = (chance.randrange(len(content) // PAGE) * PAGE for _ in "12")
    content[one : one + PAGE], content[other : other + PAGE] = (
        content[other : other + PAGE],
        content[one : one + PAGE],
    )


def copy(content: bytearray, chance: random.Random) -> None:
    one, other = (chance.randrange(len(content) // PAGE) * PAGE for _ in "12")
    content[one : one + PAGE] = content[other : other + PAGE]


def cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(1, len(content)) :]


MUTATIONS: tuple[Mutation, ...] = (flip, flip, overwrite, number, number, exchange, copy, cut)


@with_a_folder
@given(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=6), st.integers(0, 2**32))
def test_any_damage_to_the_file_is_found_or_every_record_reads_identical(
    tmp_path: Path, mutations: list[Mutation], seed: int
) -> None:
    path = write_ledger(tmp_path / "ledger.db", TWELVE, page_size=PAGE)
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    for mutate in mutations:
        if len(content) > 2 * PAGE:
            mutate(content, chance)
    path.write_bytes(content)
    if is_accepted(path, WHOLE):
        assert reads_identical(path, TWELVE)


@with_a_folder
@given(st.binary(max_size=2048), st.booleans())
def test_garbage_is_refused_in_words(tmp_path: Path, content: bytes, with_header: bool) -> None:
    path = write_ledger(tmp_path / "ledger.db", TWELVE, page_size=PAGE)
    path.write_bytes(path.read_bytes()[:100] + content if with_header else content)
    assert not is_accepted(path)


entry = st.tuples(st.sampled_from([ALICE, BOB, CAROL]), st.sampled_from([body for _, body in TWELVE.entries]))
place = st.integers(0, 12)
forgery = st.one_of(
    st.tuples(st.just("put in"), place, entry),
    st.tuples(st.just("delete"), place, st.none()),
    st.tuples(st.just("replace"), place, entry),
    st.tuples(st.just("exchange"), place, place),
    st.tuples(st.just("cut"), place, st.none()),
)


def forge(entries: list[Entry], kind: str, at: int, what: object) -> None:
    at = min(at, len(entries) - 1)
    match kind, what:
        case "put in", tuple():
            entries.insert(at, what)
        case "replace", tuple() if entries:
            entries[at] = what
        case "delete", _ if entries:
            del entries[at]
        case "exchange", int() if entries:
            other = min(what, len(entries) - 1)
            entries[at], entries[other] = entries[other], entries[at]
        case "cut", _:
            del entries[at:]
        case _:
            pass


@with_a_folder
@given(st.lists(forgery, min_size=1, max_size=4), st.integers(1, 12))
def test_a_forgery_with_every_hash_computed_anew_is_not_accepted_behind_a_checkpoint(
    tmp_path: Path, forgeries: list[tuple[str, int, object]], covered: int
) -> None:
    entries = list(TWELVE.entries)
    for kind, at, what in forgeries:
        forge(entries, kind, at, what)
    forged = replace(TWELVE, entries=tuple(entries))
    path = write_ledger(tmp_path / "ledger.db", forged, page_size=PAGE)
    assert is_accepted(path)
    genuine = forged.entries[:covered] == TWELVE.entries[:covered]
    assert is_accepted(path, Checkpoint(TWELVE.stream, covered, TWELVE.first(covered).root)) is genuine


COLUMNS = ("subject", "body", "hash")
value = st.one_of(st.sampled_from(COLUMNS), st.sampled_from(["zeroblob(16)", "zeroblob(32)", "x''"]))
change = st.one_of(
    st.builds("UPDATE records SET {} = {} WHERE sequence = {}".format, st.sampled_from(COLUMNS), value, place),
    st.builds("UPDATE OR REPLACE records SET sequence = {} WHERE sequence = {}".format, st.integers(-1, 14), place),
    st.builds("DELETE FROM records WHERE sequence = {}".format, place),
    st.builds("INSERT OR REPLACE INTO records SELECT {}, subject, body, hash FROM records LIMIT 1".format, place),
)


@with_a_folder
@given(st.lists(change, min_size=1, max_size=4))
def test_rows_changed_at_random_are_not_accepted(tmp_path: Path, changes: list[str]) -> None:
    path = write_ledger(tmp_path / "ledger.db", TWELVE, page_size=PAGE)
    tamper(path, *changes)
    assert is_accepted(path) is reads_identical(path, TWELVE)
