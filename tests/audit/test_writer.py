"""The thread that writes: order, batches, who is told what, and what happens while writing fails."""

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from support.ledger import row
from support.waiting import wait_until
from ucm_middleware import LedgerUnavailableError
from ucm_middleware.audit import writer as module
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.writer import MAX_BATCH, Writer


class Shelf:
    """A store in memory. While ``gate`` is not set, writing waits; while ``fault`` is, it fails."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fault: BaseException | None = None
        self.opened = self.closed = self.attempts = 0

    def open(self) -> "Shelf":
        self.opened += 1
        return self

    def write(self, rows: Sequence[Row]) -> None:
        self.attempts += 1
        self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.batches.append(list(rows))

    def close(self) -> None:
        self.closed += 1

    @property
    def numbers(self) -> list[int]:
        return [row[12] for batch in self.batches for row in batch]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.001)


@pytest.fixture
def writer(shelf: Shelf) -> Iterator[Writer]:
    writer = Writer(shelf.open)
    yield writer
    shelf.fault = None
    shelf.gate.set()
    writer.stop(20)


@contextmanager
def standing_still(shelf: Shelf, writer: Writer) -> Iterator[None]:
    """The writer is in the middle of a batch of its own."""
    shelf.gate.clear()
    writer.append(row(number=0))
    wait_until(lambda: shelf.attempts == 1, "the writer is writing")
    yield
    shelf.gate.set()


async def test_who_waits_goes_on_when_what_was_before_is_written(writer: Writer, shelf: Shelf) -> None:
    for number in range(5):
        writer.append(row(number=number))
    await writer.passed()
    assert shelf.numbers == [0, 1, 2, 3, 4]
    assert writer.lag == 0


async def test_nobody_goes_on_before(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        waiting = writer.passed()
        writer.append(row(number=1))
        behind = writer.passed()
        assert writer.lag == 2  # who waits does not count
        assert not waiting.done()
    await behind
    assert waiting.done()
    assert shelf.numbers == [0, 1]


async def test_what_waits_meanwhile_is_written_at_once(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        for number in range(1, 100):
            writer.append(row(number=number))
        passed = writer.passed()
    await passed
    assert [len(batch) for batch in shelf.batches] == [1, 99]


def test_a_batch_has_a_bound(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        for number in range(1, MAX_BATCH + 11):
            writer.append(row(number=number))
    writer.wait_passed(20)
    assert [len(batch) for batch in shelf.batches] == [1, MAX_BATCH, 10]
    assert shelf.numbers == list(range(MAX_BATCH + 11))


@pytest.mark.usefixtures("threads_switch_often")
def test_threads_lose_nothing_and_keep_their_order(writer: Writer, shelf: Shelf) -> None:
    def write(thread: int) -> None:
        for number in range(500):
            writer.append(row(number=thread * 1000 + number))
            if number % 50 == 0:
                writer.wait_passed(20)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.wait_passed(20)
    for of_thread in range(4):
        assert [number % 1000 for number in shelf.numbers if number // 1000 == of_thread] == list(range(500))


async def test_while_it_fails_who_waits_is_told_and_nothing_is_lost(
    writer: Writer, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.fault = OSError("the disk is full")
    with caplog.at_level(logging.WARNING):
        writer.append(row(number=1))
        with pytest.raises(LedgerUnavailableError, match="the disk is full"):
            await writer.passed()
        assert writer.problem is not None
        for number in range(2, 5):
            writer.append(row(number=number))
            with pytest.raises(LedgerUnavailableError):  # at once: it is known to fail
                writer.passed()
            with pytest.raises(LedgerUnavailableError):
                writer.wait_passed(20)
        assert shelf.numbers == []
        attempts = shelf.attempts
        wait_until(lambda: shelf.attempts > attempts + 3, "it tries again")
        shelf.fault = None
        wait_until(lambda: writer.problem is None, "it writes again")
    await writer.passed()
    assert shelf.numbers == [1, 2, 3, 4]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]  # once each, not for each attempt


def test_a_store_that_failed_is_opened_anew(writer: Writer, shelf: Shelf) -> None:
    shelf.fault = OSError("gone")
    writer.append(row(number=1))
    wait_until(lambda: shelf.opened > 2, "it is opened again")
    assert shelf.closed >= shelf.opened - 1


async def test_a_barrier_far_behind_is_told_of_the_failure_too(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        for number in range(1, 2 * MAX_BATCH):
            writer.append(row(number=number))
        behind = writer.passed()
        shelf.fault = OSError("the disk is full")
    with pytest.raises(LedgerUnavailableError):
        async with asyncio.timeout(20):
            await behind


async def test_who_stopped_waiting_harms_nobody(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        given_up, other = writer.passed(), writer.passed()
        given_up.cancel()
    await other
    assert given_up.cancelled()


def test_a_loop_that_has_ended_harms_nobody(writer: Writer, shelf: Shelf) -> None:
    async def leave() -> None:
        writer.passed()

    with standing_still(shelf, writer):
        asyncio.run(leave())
    writer.wait_passed(20)


def test_to_wait_in_a_thread_has_an_end(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer), pytest.raises(LedgerUnavailableError, match="took more than 0 seconds"):
        writer.wait_passed(0)


def test_the_end_writes_what_is_in_line(shelf: Shelf) -> None:
    writer = Writer(shelf.open)
    with standing_still(shelf, writer):
        for number in range(1, 10):
            writer.append(row(number=number))
        stopping = threading.Thread(target=writer.stop, args=(20,))
        stopping.start()
    stopping.join()
    assert shelf.numbers == list(range(10))
    assert (shelf.opened, shelf.closed) == (1, 1)


def test_after_its_end_it_begins_again(shelf: Shelf) -> None:
    writer = Writer(shelf.open)
    for number in range(3):
        writer.append(row(number=number))
        writer.stop(20)
    assert shelf.numbers == [0, 1, 2]
    assert (shelf.opened, shelf.closed) == (3, 3)


def test_an_end_while_it_fails_says_what_is_lost(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(shelf.open)
    shelf.fault = OSError("the disk is full")
    with caplog.at_level(logging.CRITICAL):
        writer.append(row(number=1))
        writer.append(row(number=2))
        writer.stop(0.01)
    assert "2 audit records are not written: the audit ledger cannot be written: the disk is full" in caplog.text
    shelf.fault = None
    writer.append(row(number=3))
    writer.stop(20)
    assert shelf.numbers == [1, 2, 3]


def test_an_end_while_it_fails_tries_again_for_as_long_as_it_may(shelf: Shelf) -> None:
    writer = Writer(shelf.open)
    shelf.fault = OSError("the disk is full")
    writer.append(row(number=1))
    wait_until(lambda: writer.problem is not None, "it fails")
    stopping = threading.Thread(target=writer.stop, args=(20,))
    stopping.start()
    attempts = shelf.attempts
    wait_until(lambda: shelf.attempts > attempts + 3, "it tries again")
    shelf.fault = None
    stopping.join()
    assert shelf.numbers == [1]


def test_none_is_started_before_there_is_something_to_write(shelf: Shelf) -> None:
    Writer(shelf.open).stop(20)
    assert shelf.opened == 0


def test_its_thread_ends_with_it(shelf: Shelf) -> None:
    writer = Writer(shelf.open)
    writer.append(row())
    thread = writer._thread
    assert thread is not None
    assert (thread.name, thread.is_alive()) == (module.THREAD_NAME, True)
    writer.stop(20)
    assert not thread.is_alive()


class Reporter(logging.Filter):
    """What applications hang on their loggers: it expects a request, and there is none in the writer's thread."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise LookupError("no request")


async def test_a_logger_that_raises_stops_nothing(writer: Writer, shelf: Shelf) -> None:
    reporter = Reporter()
    module.logger.addFilter(reporter)
    try:
        shelf.fault = OSError("the disk is full")
        writer.append(row(number=1))
        with pytest.raises(LedgerUnavailableError):
            await writer.passed()
        assert writer.problem is not None
        shelf.fault = None
        wait_until(lambda: writer.problem is None, "it writes again")
        writer.append(row(number=2))
        await writer.passed()
    finally:
        module.logger.removeFilter(reporter)
    assert shelf.numbers == [1, 2]


@pytest.mark.parametrize("fault", [MemoryError(), SystemExit(), KeyboardInterrupt()])
async def test_whatever_a_store_raises_the_thread_goes_on(writer: Writer, shelf: Shelf, fault: BaseException) -> None:
    shelf.fault = fault
    writer.append(row(number=1))
    with pytest.raises(LedgerUnavailableError):
        await writer.passed()
    shelf.fault = None
    wait_until(lambda: writer.problem is None, "it writes again")
    assert shelf.numbers == [1]


async def test_who_comes_while_it_fails_is_told_with_those_before(writer: Writer, shelf: Shelf) -> None:
    with standing_still(shelf, writer):
        shelf.fault = OSError("the disk is full")
        waiting = writer.passed()
    attempts = shelf.attempts
    with pytest.raises(LedgerUnavailableError):
        await waiting
    assert shelf.attempts <= attempts + 1


def test_where_no_thread_can_be_started_it_is_written_here(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    writer = Writer(shelf.open)
    monkeypatch.setattr(threading.Thread, "start", start)
    writer.append(row(number=1))
    writer.append(row(number=2))
    writer.wait_passed(20)
    assert shelf.numbers == [1, 2]
    assert (shelf.opened, shelf.closed) == (2, 2)


def test_what_the_writer_itself_comes_upon_waits_for_nobody(shelf: Shelf) -> None:
    writer = Writer(shelf.open)

    class Finalizing(Shelf):
        def write(self, rows: Sequence[Row]) -> None:
            writer.wait_passed(20)
            shelf.write(rows)
            writer.stop(20)

    writer._open_store = Finalizing
    writer.append(row(number=1))
    wait_until(lambda: shelf.numbers == [1] and not writer.lag, "it is written")
    assert writer._stopped is not None
    writer._stopped.join()


async def test_nobody_waits_for_a_disk_that_hangs(
    writer: Writer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_still(shelf, writer):
        writer.append(row(number=1))
        before = writer.passed()
        assert writer.trouble() is None  # it may still be through in time
        monkeypatch.setattr(module, "STUCK_AFTER", 0.0)
        with pytest.raises(LedgerUnavailableError, match="does its disk hang"):
            writer.passed()
        with pytest.raises(LedgerUnavailableError, match="does its disk hang"):
            await before
        with pytest.raises(LedgerUnavailableError, match="does its disk hang"):
            writer.wait_passed(20)
    wait_until(lambda: writer.lag == 0, "the disk has come back")
    assert writer.trouble() is None
    await writer.passed()
    assert shelf.numbers == [0, 1]


async def test_those_whose_records_are_in_hand_are_told_too(
    writer: Writer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_still(shelf, writer):
        writer.append(row(number=1))
        waiting = writer.passed()
        first, shelf.gate = shelf.gate, threading.Event()
        first.set()
        wait_until(lambda: shelf.attempts == 2 and writer.waiting() == 0, "both are in hand")
        monkeypatch.setattr(module, "STUCK_AFTER", 0.0)
        assert writer.trouble() is not None
        with pytest.raises(LedgerUnavailableError, match="does its disk hang"):
            await waiting
