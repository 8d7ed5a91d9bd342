"""A writer that is stopped while others append: what comes later waits for it, and what came in between is written."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from support.waiting import PATIENCE, wait_until
from ucm_middleware.audit import AuditRecord
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.writer import ThreadBarrier, Writer


class Slow:
    """A store that writes a batch when it is told to."""

    def __init__(self) -> None:
        self.begun: list[list[object]] = []
        self.written: list[object] = []
        self._turns = threading.Semaphore(0)

    def write(self, rows: Sequence[Row]) -> None:
        numbers: list[object] = [row[12] for row in rows]
        self.begun.append(numbers)
        assert self._turns.acquire(timeout=PATIENCE)
        self.written += numbers

    def close(self) -> None: ...

    def let_write(self, batches: int = 1) -> None:
        self._turns.release(batches)

    def wait_until_begun(self, *batches: list[object]) -> None:
        wait_until(lambda: self.begun == list(batches), f"the batches {batches} are begun")


@pytest.fixture
def store() -> Slow:
    return Slow()


@pytest.fixture
def writer(store: Slow) -> Iterator[Writer]:
    writer = Writer(lambda: store)
    yield writer
    store.let_write(100)
    writer.stop(PATIENCE)


def row(number: int) -> Row:
    return AuditRecord("opened", 1000.0, "alice", record_id=number)


def stop(writer: Writer) -> threading.Thread:
    """Stop it, which lasts until it has written. Returns the thread that waits for that."""
    stopping = threading.Thread(target=writer.stop, args=(PATIENCE,))
    stopping.start()
    wait_until(lambda: writer._thread is None and writer.waiting() > 0, "it is told to stop")
    return stopping


def test_what_comes_later_waits_until_the_one_before_has_written(writer: Writer, store: Slow) -> None:
    writer.append(row(1))
    store.wait_until_begun([1])
    stopping = stop(writer)
    behind = ThreadBarrier()
    writer._put(behind)  # by a thread that had found the writer running
    writer.append(row(2))  # this starts another writer
    assert not behind.passed.wait(0.2)  # record 1 stands before it, and is not written yet
    store.let_write(2)
    assert behind.passed.wait(PATIENCE)
    assert store.written[0] == 1
    stopping.join()


def test_what_slipped_in_behind_the_stop_is_written_and_then_it_ends(writer: Writer, store: Slow) -> None:
    writer.append(row(1))
    store.wait_until_begun([1])
    writer.append(row(2))
    stopping = stop(writer)
    store.let_write()
    store.wait_until_begun([1], [2])
    writer._put(row(3))  # by a thread that had found the writer running
    store.let_write()
    store.wait_until_begun([1], [2], [3])
    store.let_write()
    stopping.join(PATIENCE / 2)
    assert not stopping.is_alive()
    assert store.written == [1, 2, 3]
