"""SQLiteLedger under the port, and under a manager."""

import gc
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.contexts import MakeManager, events, running_as
from support.ledger import SECRET, bodies, bytes_of, query, ring, row
from support.waiting import wait_until
from ucm_middleware import ConfigurationError, CrossUserAccessError, LedgerFileError, LedgerUnavailableError
from ucm_middleware.audit import DurableLedger, SQLiteLedger, UserMention, queued
from ucm_middleware.audit.file import PART_BITS
from ucm_middleware.audit.reading import SHOWN
from ucm_middleware.audit.records import Event
from ucm_middleware.environment import IsolatedEnvironment

MakeLedger = Callable[..., SQLiteLedger]


@contextmanager
def maker(folder: Path, keys: str | None) -> Iterator[MakeLedger]:
    """Makes started ledgers on one file."""
    with ExitStack() as ledgers:

        def make(**settings: Any) -> SQLiteLedger:
            ledger = SQLiteLedger(folder / "audit.db", keys=None if keys is None else folder / keys, **settings)
            ledgers.enter_context(closing(ledger))
            ledger.start(ring())
            return ledger

        yield make


@pytest.fixture
def make_plain(tmp_path: Path) -> Iterator[MakeLedger]:
    with maker(tmp_path, None) as make:
        yield make


@pytest.fixture
def make_sealed(tmp_path: Path) -> Iterator[MakeLedger]:
    with maker(tmp_path, "keys.db") as make:
        yield make


@pytest.fixture(params=[None, "keys.db"], ids=["plain", "sealed"])
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeLedger]:
    with maker(tmp_path, request.param) as make:
        yield make


@contextmanager
def standing_still(ledger: SQLiteLedger) -> Iterator[None]:
    """Another program has the file locked, and one record is in the writer's hand."""
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ledger.append(row("somebody", 0))
        assert ledger._writer is not None
        wait_until(lambda: ledger._writer is not None and ledger._writer.waiting() == 0, "it is in the writer's hand")
        yield
        other.execute("ROLLBACK")


def numbers(ledger: SQLiteLedger, user_id: str | None) -> list[int]:
    trail = ledger.trail(user_id)
    return [] if trail is None else [record.record_id for record in trail.records]


def test_it_is_a_durable_ledger(make: MakeLedger) -> None:
    assert isinstance(make(), DurableLedger)


def test_each_users_records_are_read_back_in_order(make: MakeLedger) -> None:
    ledger = make()
    for number, user in enumerate(("alice", "bob", None, "alice", None, "alice")):
        ledger.append(row(user, number))
    assert numbers(ledger, "alice") == [0, 3, 5]
    assert numbers(ledger, "bob") == [1]
    assert numbers(ledger, None) == [2, 4]
    assert ledger.trail("carol") is None
    assert ledger.trail("alice") == make().trail("alice")


def test_a_trail_takes_one_connection_to_each_file_and_one_to_recognise_it(
    make_sealed: MakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_sealed()
    ledger.append(row())
    ledger.flush()
    connect, opened = sqlite3.connect, list[str]()

    def noting(*given: Any, **settings: Any) -> object:
        opened.append(Path(given[0]).name)
        return connect(*given, **settings)

    monkeypatch.setattr(sqlite3, "connect", noting)
    assert numbers(ledger, "alice") == [1]
    assert opened == ["audit.db?immutable=1", "audit.db?mode=ro", "keys.db?immutable=1", "keys.db?mode=ro"]


def test_a_record_comes_back_with_all_its_fields(make: MakeLedger) -> None:
    ledger = make()
    record = row(
        "alice", 7, "denied", actor_id="bob", given_thread_id="t", given_run_id="r", outcome="denied", reason="because",
        seconds=1.25, trace_id=5, span_id=6,
        data=(("asked_for", UserMention("carol")), ("audit_metadata", {"plan": ["gold", 1, None]})),
    )  # fmt: skip
    ledger.append(record)
    trail = ledger.trail("alice")
    assert trail is not None
    [found] = trail.records
    assert found == record


def test_somebody_who_was_only_named_was_never_seen(make: MakeLedger) -> None:
    ledger = make()
    ledger.append(row("alice", data=(("asked_for", UserMention("bob")),)))
    assert ledger.trail("bob") is None


def test_a_trail_is_as_long_as_it_says_and_tells_what_it_left_out(make: MakeLedger) -> None:
    ledger = make()
    ledger.append(row("alice", 0, "opened"))
    for number in range(1, SHOWN + 11):
        ledger.append(row("alice", number, "denied"))
    trail = ledger.trail("alice")
    assert trail is not None
    assert [record.record_id for record in trail.records] == list(range(11, SHOWN + 11))
    assert trail.dropped == 11
    assert trail.opening is not None
    assert (trail.opening.event, trail.opening.record_id) == ("opened", 0)


def test_it_tells_what_it_left_out_of_parts_that_it_did_not_read(make: MakeLedger) -> None:
    ledger = make()
    older, part = 100, 1 << PART_BITS
    for number in range(1, part):
        ledger.append(row("alice" if number <= older else "bob", number, "denied"))
    ledger.append(row("alice", part, "opened"))
    for number in range(part + 1, part + SHOWN):
        ledger.append(row("alice", number, "denied"))
    trail = ledger.trail("alice")
    assert trail is not None
    assert [record.record_id for record in trail.records] == list(range(part, part + SHOWN))
    assert trail.dropped == older
    bobs = ledger.trail("bob")
    assert bobs is not None
    assert bobs.dropped == 0


@pytest.mark.parametrize("gap", [4095, 4096, 8200])
def test_what_lies_far_apart_is_found_in_order(make: MakeLedger, gap: int) -> None:
    ledger = make()
    far_apart: tuple[tuple[int, Event], ...] = (
        (0, "opened"), (1, "denied"), (gap, "opened"), (gap + 1, "denied"), (2 * gap, "denied")
    )  # fmt: skip
    for number, event in far_apart:
        ledger.append(row("alice", number, event))
    for number in range(gap):
        ledger.append(row("bob", number, "denied"))
    ledger.append(row("alice", 9999, "closed"))
    trail = ledger.trail("alice")
    assert trail is not None
    assert [record.record_id for record in trail.records] == [0, 1, gap, gap + 1, 2 * gap, 9999]
    assert trail.opening is not None
    assert trail.opening.record_id == gap


def test_a_manager_reads_its_users_trail_before_and_after_the_end(make_manager: MakeManager, tmp_path: Path) -> None:
    ledger = SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db")
    with closing(ledger):
        manager = make_manager(ledger=ledger, secret=SECRET)
        context = manager.create_isolated_context("alice", audit_metadata={"plan": "gold"})
        before = manager.get_audit_trail("alice")
        context.close()
        after = manager.get_audit_trail("alice")
        assert manager.get_audit_trail("bob") is None
    assert before is not None
    assert after is not None
    assert [event["event"] for event in before["events"]] == ["opened"]
    assert [event["event"] for event in after["events"]] == ["opened", "closed"]
    for trail in (before, after):
        assert (trail["user_id"], trail["context_source"]) == ("alice", "create_context")
        assert (trail["isolation_verified"], trail["plan"]) == (True, "gold")
        trail["events"].clear()  # a copy
    assert before["context_set_at"] == after["context_set_at"]


def test_the_next_manager_goes_on_where_the_last_one_ended(make_manager: MakeManager, tmp_path: Path) -> None:
    found = 0
    for _ in range(3):
        with closing(SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db")) as ledger:
            manager = make_manager(ledger=ledger, secret=SECRET)
            manager.create_isolated_context("alice").close()
            found = len(events(manager, "alice", "opened", "closed"))
    assert found == 6


def test_a_denial_names_the_other_to_who_may_read_it(make_manager: MakeManager, tmp_path: Path) -> None:
    with closing(SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db")) as ledger:
        manager = make_manager(ledger=ledger, secret=SECRET)
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            manager.get_context("bob-the-builder")
        [denied] = events(manager, "alice", "denied")
    assert denied["asked_for"] == "bob-the-builder"
    # Three letters would stand in one sealed file out of some hundreds by chance.
    assert b"bob-the-builder" not in (tmp_path / "audit.db").read_bytes()


def test_in_a_sealed_ledger_no_user_stands_in_the_clear(make_manager: MakeManager, tmp_path: Path) -> None:
    with closing(SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db")) as ledger:
        manager = make_manager(ledger=ledger, secret=SECRET)
        context = manager.create_isolated_context(
            "alice-liddell", "request-of-alice", thread_id="thread-of-alice", audit_metadata={"street": "Wonderland"}
        )
        with manager.privileged(reason="looked for a rabbit", users=["alice-liddell", "dodgson"]):
            context.close()
        ledger.flush()
        found = bytes_of(tmp_path)
    for text in (b"liddell", b"of-alice", b"Wonderland", b"dodgson"):
        assert text not in found


def test_one_ledger_has_one_manager(make: MakeLedger) -> None:
    with pytest.raises(ConfigurationError, match="has a manager already"):
        make().start(ring())


def test_without_a_manager_it_says_so(tmp_path: Path) -> None:
    ledger = SQLiteLedger(tmp_path / "audit.db", keys=None)
    with pytest.raises(LedgerUnavailableError, match="has no manager"):
        ledger.append(row())
    assert (ledger.lag, ledger.problem, ledger.has_room) == (0, None, True)
    ledger.close()
    assert not ledger.path.exists()


@pytest.mark.parametrize("capacity", [0, 1, -5, 2.5, True, "many"])
def test_a_capacity_that_is_none_is_refused(tmp_path: Path, capacity: Any) -> None:
    with pytest.raises(ConfigurationError, match="capacity"):
        SQLiteLedger(tmp_path / "audit.db", keys=None, capacity=capacity)


def test_keys_in_the_ledger_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another file"):
        SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "audit.db")


def test_production_needs_a_secret_for_the_keys(make_manager: MakeManager, tmp_path: Path) -> None:
    production = IsolatedEnvironment(environ={"UCM_ENVIRONMENT": "production"})
    with pytest.raises(ConfigurationError, match="UCM_SECRET"):
        make_manager(ledger=SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db"), environment=production)
    with closing(SQLiteLedger(tmp_path / "plain.db", keys=None)) as ledger:
        make_manager(ledger=ledger, environment=production)


def test_a_key_file_that_is_gone_is_not_replaced_by_an_empty_one(make_sealed: MakeLedger) -> None:
    ledger = make_sealed()
    ledger.append(row())
    ledger.close()
    assert ledger.keys is not None
    ledger.keys.unlink()
    with pytest.raises(LedgerFileError, match="does not exist, and the ledger has records"):
        make_sealed()
    assert not ledger.keys.exists()


def test_a_full_line_makes_synchronous_code_wait_and_loses_nothing(make: MakeLedger) -> None:
    ledger = make(capacity=4)
    waited = threading.Event()

    def write() -> None:
        for number in range(1, 10):
            ledger.append(row("alice", number))
        waited.set()

    with standing_still(ledger):
        thread = threading.Thread(target=write)
        thread.start()
        wait_until(lambda: ledger.lag == 4, "the line is full")
        assert not ledger.has_room
        assert not waited.is_set()
    thread.join()
    assert numbers(ledger, "alice") == list(range(1, 10))


async def test_what_waits_for_room_gets_it(make: MakeLedger) -> None:
    ledger = make(capacity=4)
    with standing_still(ledger):
        ledger.append(row("alice", 1))
        ledger.append(row("alice", 2))
        assert not ledger.has_room
        room = ledger.durable()
    await room
    assert ledger.has_room


def test_when_the_line_is_full_and_cannot_be_written_ends_are_kept_and_the_rest_is_refused(
    make: MakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(capacity=4)
    away = ledger.path.with_name("away")
    ledger.append(row("alice", 0))
    ledger.flush()
    ledger.path.rename(away)
    number = 0
    with pytest.raises(LedgerUnavailableError, match=r"moved or deleted|does not exist"):
        while number < 100:
            number += 1
            ledger.append(row("alice", number))
    assert ledger.problem is not None
    lag = ledger.lag
    ledger.append(row("alice", 1000, "closed"))
    assert ledger.lag > lag
    away.rename(ledger.path)
    wait_until(lambda: ledger.problem is None, "it writes again")
    assert numbers(ledger, "alice") == [*range(number), 1000]


def test_a_ledger_that_is_let_go_of_writes_what_it_has(tmp_path: Path) -> None:
    ledger = SQLiteLedger(tmp_path / "audit.db", keys=None)
    ledger.start(ring())
    for number in range(100):
        ledger.append(row("alice", number))
    assert ledger._writer is not None
    thread = ledger._writer._thread
    assert thread is not None
    del ledger
    gc.collect()
    assert len(bodies(tmp_path / "audit.db")) == 100
    assert not thread.is_alive()


def test_what_cannot_be_encoded_does_not_stop_the_others(make: MakeLedger) -> None:
    ledger = make()
    ledger.append(row("alice", 1))
    ledger.append(row("alice", 2, data=(("x", object()),)))
    ledger.append(row("alice", 3, reason=object()))  # no text at all: a fault of the one who wrote it
    ledger.append(row("alice", 4))
    assert numbers(ledger, "alice") == [1, 2, 3, 4]


def test_erasing_makes_the_anonymous_past_of_a_user_unreadable_too(make_sealed: MakeLedger) -> None:
    ledger = make_sealed()
    visitor = "anonymous_" + "7" * 32
    ledger.append(row(visitor, 1, reason="looked around"))
    ledger.append(row("alice", 2, "bound", data=(("anonymous_id", UserMention(visitor)),)))
    ledger.append(row(visitor, 3, "bound", data=(("user_id", UserMention("alice")),)))
    ledger.append(row("bob", 4, data=(("asked_for", UserMention("alice")),)))
    assert numbers(ledger, visitor) == [1, 3]
    assert ledger.erase("alice", reason="asked for it") == 2
    assert ledger.trail("alice") is None
    assert ledger.trail(visitor) is None
    trail = ledger.trail("bob")
    assert trail is not None
    assert trail.records[0].data == (("asked_for", "erased"),)
    nobodys = ledger.trail(None)
    assert nobodys is not None
    [erased] = nobodys.records
    assert (erased.event, erased.reason) == ("erased", "asked for it")
    subjects = dict(erased.data)["subjects"]
    assert isinstance(subjects, list)
    assert len(subjects) == 2
    ledger.append(row("alice", 5))
    assert numbers(ledger, "alice") == [5]
    assert query(ledger.path, "SELECT count(*) FROM records") == [(6,)]


def test_without_keys_nobody_can_be_erased(make_plain: MakeLedger) -> None:
    with pytest.raises(ConfigurationError, match="keys"):
        make_plain().erase("alice", reason="asked for it")


def test_a_link_is_followed_to_where_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "STOP_PATIENCE", 0.01)
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    with closing(SQLiteLedger(tmp_path / "link.db", keys=None)) as ledger:
        ledger.start(ring())
        ledger.append(row("alice", 1))
        ledger.flush()
        (tmp_path / "real.db-wal").unlink()
        ledger.append(row("alice", 2))
        with pytest.raises(LedgerUnavailableError, match="-wal"):
            ledger.flush()


def test_a_log_that_is_taken_away_loses_nothing_while_the_process_lives(make: MakeLedger) -> None:
    ledger = make()
    ledger.append(row("alice", 1))
    ledger.flush()
    ledger.path.with_name("audit.db-wal").unlink()
    ledger.append(row("alice", 2))
    with pytest.raises(LedgerUnavailableError, match="-wal"):
        ledger.flush()
    wait_until(lambda: ledger.problem is None, "it is written again")
    assert numbers(ledger, "alice") == [1, 2]


def test_records_that_were_acknowledged_and_are_gone_are_not_written_over(
    make: MakeLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make()
    for file in tmp_path.glob("*.db"):
        shutil.copy(file, tmp_path / f"{file.name}.before")
    ledger.append(row("alice", 1))
    ledger.flush()
    ledger.close()
    monkeypatch.setattr(queued, "STOP_PATIENCE", 0.01)  # only now: until it is closed, nothing may be put back
    for file in tmp_path.glob("*.before"):  # what a restored backup does
        file.replace(file.with_suffix(""))
    ledger.append(row("alice", 2))
    problem = "has 0 records, and 1 were acknowledged in this process"
    wait_until(lambda: problem in (ledger.problem or ""), "what is missing is told")
    assert query(ledger.path, "SELECT size FROM ledger") == [(0,)]
    ledger.close()  # as long as it has little patience
