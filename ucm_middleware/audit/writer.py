"""The thread that makes records durable: whatever waits in line is written in one transaction, then told so."""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from ucm_middleware.audit.records import Row
from ucm_middleware.errors import LedgerUnavailableError
from ucm_middleware.forking import quiet_during_fork

logger = logging.getLogger(__name__)

THREAD_NAME: Final = "ucm-middleware ledger"
MAX_BATCH: Final = 4096
"""The most records in one transaction."""

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 2.0
"""Seconds between attempts to write, while that fails."""

STUCK_AFTER = 10.0
"""Seconds that one transaction may take until nobody waits for it any more: a disk may hang and never fail."""


class Store(Protocol):
    """Where a batch of records is made durable."""

    def write(self, rows: Sequence[Row]) -> None:
        """Keep the records, all or none; durable when it returns."""
        ...

    def close(self) -> None:
        """Let go of what was opened."""
        ...


class ThreadBarrier:
    """Stands in line behind what a thread waits for. After one with a ``last_try``, the writer ends: when all is
    written, or at that moment of the monotonic clock.
    """

    __slots__ = ("error", "last_try", "passed")

    def __init__(self, *, last_try: float | None = None) -> None:
        self.last_try = last_try
        self.passed = threading.Event()
        self.error: LedgerUnavailableError | None = None


Barrier = asyncio.Future[None] | ThreadBarrier
"""What stands in line behind what somebody waits for: a future for a task."""


class Writer:
    """Takes rows and barriers from any thread, in order. ``open_store`` is called in the writer's own thread, and what
    it opens is used there. It is closed there too, or before the process forks: SQLite does not know of forks. A child
    of a process that has a file open believes that it holds locks which it does not.
    """

    __slots__ = (
        "__weakref__",
        "_barriers",
        "_begun",
        "_in_hand",
        "_line",
        "_lock",
        "_open_store",
        "_put",
        "_stopped",
        "_store",
        "_thread",
        "_writing",
        "problem",
        "rows",
        "waiting",
    )

    _put: Callable[[Row | Barrier], None]
    waiting: Callable[[], int]
    """How many rows and barriers are in line, but for those that are in hand."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self.after_fork()
        quiet_during_fork(self)

    def before_fork(self) -> None:
        """End the transaction that is under way, and let go of the file."""
        self._writing.acquire()
        self._let_go()

    def after_fork_in_parent(self) -> None:
        """Go on writing."""
        self._writing.release()

    def after_fork(self) -> None:
        """Begin anew: what was in line, and the thread, are the parent's."""
        self._lock = threading.RLock()  # reentrant: a finalizer or a signal handler may close a context meanwhile
        self._writing = threading.Lock()  # held while the store is in use
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._stopped: threading.Thread | None = None
        self._barriers: set[Barrier] = set()  # those in line
        self._in_hand: list[Barrier] = []  # those that stood behind what is just being written
        self._begun: float | None = None  # when that began
        self.rows: list[Row] = []
        """In hand: taken from the line, and not written yet."""
        self.problem: str | None = None
        self._line: SimpleQueue[Row | Barrier] = SimpleQueue()  # its put is reentrant too
        self._put, self.waiting = self._line.put, self._line.qsize

    def append(self, row: Row) -> None:
        """Put a row in line."""
        self._put(row)
        if self._thread is None:  # looked at last: who stops it meanwhile leaves what is in line
            self._start()

    def _stand(self, barrier: Barrier) -> None:
        """Put a barrier in line."""
        self._barriers.add(barrier)
        self._put(barrier)
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, args=(self._stopped,), name=THREAD_NAME, daemon=True)
            self._thread = thread  # first: what interrupts the start must not start another
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending
                self._thread = None
                self._write_here()

    def stop(self, timeout: float) -> None:
        """Write what is in line, for so many seconds at most, and end the thread. What is left stays in line."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stopped = thread or self._stopped
        if thread is not None:
            last = ThreadBarrier(last_try=time.monotonic() + timeout)
            self._barriers.add(last)
            self._put(last)
            if thread is threading.current_thread():  # a finalizer that the writer itself came upon
                return
            thread.join(timeout)
            if self.rows:
                logger.critical("%d audit records are not written: %s", len(self.rows), self.problem or "it takes long")

    @property
    def lag(self) -> int:
        """How many rows are not written yet."""
        return max(0, self.waiting() - len(self._barriers)) + len(self.rows)

    def passed(self) -> "asyncio.Future[None]":
        """What to await until what is in line now is durable. Raises LedgerUnavailableError."""
        if (trouble := self.trouble()) is not None:
            raise LedgerUnavailableError(trouble)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stand(future)
        return future

    def wait_passed(self, timeout: float) -> None:
        """The same in a thread, for so many seconds at most."""
        if (trouble := self.trouble()) is not None:
            raise LedgerUnavailableError(trouble)
        if self._thread is threading.current_thread():  # likewise: it would wait for itself
            return
        barrier = ThreadBarrier()
        self._stand(barrier)
        if not barrier.passed.wait(timeout):
            raise LedgerUnavailableError(
                f"the audit ledger took more than {timeout:g} seconds to write what was in line"
            )
        if barrier.error is not None:
            raise barrier.error

    def trouble(self) -> str | None:
        """Why nothing can be written at the moment. Whoever is the first to ask after a disk has hung for too long lets
        go of those who wait for it.
        """
        begun = self._begun
        if begun is None or self.problem is not None or time.monotonic() - begun < STUCK_AFTER:
            return self.problem
        stuck = (
            f"the audit ledger has been writing for more than {STUCK_AFTER:g} seconds and is not through: "
            "does its disk hang, or another process hold the file?"
        )
        _release([*self._barriers, *self._in_hand], stuck)
        return stuck

    # In the thread.

    def _run(self, predecessor: threading.Thread | None) -> None:
        if predecessor is not None:
            predecessor.join()  # what it has in hand comes before whatever is in line
        rows = self.rows
        last_try: float | None = None
        pause = FIRST_PAUSE
        while last_try is None or rows or self.waiting():  # what came behind the last barrier is written too
            # While writing fails, all that waits: whoever stands behind a barrier is told at once.
            barriers = _take(self._line, rows, MAX_BATCH if self.problem is None else sys.maxsize, wait=not rows)
            self._barriers.difference_update(barriers)
            self._in_hand = barriers
            last_try = last_try or next(filter(None, map(_last_try, barriers)), None)
            try:
                if rows:
                    self._write(rows)
            except BaseException as error:  # noqa: BLE001 - whatever it is: the records stay, and are tried again
                self._report(error, len(rows))
                barriers += _take(self._line, rows)  # who came while it was tried
                self._barriers.difference_update(barriers)
                _release(barriers, self.problem)
                if last_try is not None and time.monotonic() + pause >= last_try:
                    break
                threading.Event().wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            rows.clear()
            was_problem, self.problem, pause = self.problem, None, FIRST_PAUSE
            _release(barriers, None)
            if was_problem is not None:
                with suppress(Exception):  # whatever handlers and filters of the application raise
                    logger.warning("the audit ledger can be written again")
        with self._writing:
            self._let_go()

    def _write(self, rows: Sequence[Row]) -> None:
        with self._writing:
            self._begun = time.monotonic()
            try:
                if self._store is None:
                    self._store = self._open_store()
                self._store.write(rows)
            except BaseException:
                self._let_go()
                raise
            finally:
                self._begun = None

    def _let_go(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            with suppress(Exception):  # where it has failed, that was reported
                store.close()

    def _report(self, error: BaseException, number: int) -> None:
        is_new = self.problem is None
        self.problem = f"the audit ledger cannot be written: {error}"
        if is_new:  # once for each time that it begins
            with suppress(Exception):  # whatever handlers and filters of the application raise
                logger.error("the audit ledger cannot be written, %d records wait: %s", number, error, exc_info=error)

    def _write_here(self) -> None:
        """Write what is in line in this thread, since there can be no other any more."""
        barriers = _take(self._line, self.rows)
        self._barriers.difference_update(barriers)
        try:
            if self.rows:
                self._write(self.rows)
        except Exception as error:  # noqa: BLE001 - as in the thread
            self._report(error, len(self.rows))
        else:
            self.rows.clear()
        _release(barriers, self.problem)
        self._let_go()


def _last_try(barrier: Barrier) -> float | None:
    return barrier.last_try if isinstance(barrier, ThreadBarrier) else None


def _take(
    line: SimpleQueue[Row | Barrier], rows: list[Row], most: int = sys.maxsize, *, wait: bool = False
) -> list[Barrier]:
    """Move what is in line to the end of ``rows``. Returns the barriers that stood among it."""
    barriers: list[Barrier] = []
    with suppress(Empty):
        item = line.get(block=wait)
        while True:
            if isinstance(item, tuple):
                rows.append(item)
                if len(rows) >= most:
                    break
            else:
                barriers.append(item)
            item = line.get_nowait()
    return barriers


def _release(barriers: list[Barrier], problem: str | None) -> None:
    """Tell all who wait, with one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for barrier in barriers:
        if isinstance(barrier, ThreadBarrier):
            barrier.error = None if problem is None else LedgerUnavailableError(problem)
            barrier.passed.set()
        else:
            by_loop.setdefault(barrier.get_loop(), []).append(barrier)
    barriers.clear()  # with an error, each holds the frames of who waited, and this thread may rest for long
    for loop, futures in by_loop.items():
        with suppress(RuntimeError):  # that loop is closed, and whoever waited on it has gone
            loop.call_soon_threadsafe(_settle, futures, problem)


def _settle(futures: Iterable[asyncio.Future[None]], problem: str | None) -> None:
    for future in futures:
        if future.done():  # whoever waited was cancelled, or told already
            continue
        if problem is None:
            future.set_result(None)
        else:
            future.set_exception(LedgerUnavailableError(problem))
