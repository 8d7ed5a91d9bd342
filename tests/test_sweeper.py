"""The sweeper's thread: there when a deadline is, awake in time, and gone with its manager."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.requests import HTTPConnection

import ucm_middleware
from support.asgi import exchange, http_scope
from support.clock import Clock
from support.contexts import MakeManager, visitor
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    Principal,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    create_isolated_execution_context,
    hookimpl,
)
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import Row
from ucm_middleware.sweeper import Sweeper
from ucm_middleware.types import Receive, Scope, Send

SOON = 0.02
HOUR = 3600.0


class Owner:
    """What a sweeper works for: counts the sweeps, and asked for the next wake gives scripted answers, then None."""

    def __init__(self, *answers: Callable[[], float | None]) -> None:
        self.answers = list(answers)
        self.swept = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.sweeper = Sweeper(self.sweep, self.next_wake, time.monotonic)

    def sweep(self) -> None:
        self.swept.release()

    def next_wake(self) -> float | None:
        self.asked.release()
        return self.answers.pop(0)() if self.answers else None


Started = Callable[[], set[threading.Thread]]


@pytest.fixture
def started() -> Started:
    """The sweepers' threads that the test has started."""

    def sweepers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "ucm-middleware sweeper"} - before

    before: set[threading.Thread] = set()
    before = sweepers()
    return sweepers


def is_closed(*contexts: object) -> Callable[[], bool]:
    return lambda: all("closed>" in repr(context) for context in contexts)


def test_there_is_a_thread_from_the_first_deadline_on(started: Started, make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.create_isolated_context("alice")
    assert not started()
    manager.create_isolated_context("alice", ttl_seconds=HOUR)
    (first,) = started()
    manager.create_isolated_context("bob", ttl_seconds=HOUR)
    assert started() == {first}
    assert first.daemon


def test_a_context_is_closed_at_its_deadline_without_anyone_asking() -> None:
    manager = UserContextManager(guard="open")
    released = threading.Event()
    context = manager.create_isolated_context("alice", ttl_seconds=SOON)
    context.callback(released.set)
    assert released.wait(PATIENCE)
    wait_until(is_closed(context), "the context is closed")
    assert manager.get_active_contexts() == {}


def test_the_thread_wakes_for_a_deadline_before_the_one_it_sleeps_for() -> None:
    owner = Owner(lambda: time.monotonic() + HOUR)
    owner.sweeper.plan(time.monotonic() + HOUR)
    assert owner.swept.acquire(timeout=PATIENCE)
    assert owner.asked.acquire(timeout=PATIENCE)
    with owner.sweeper._condition:  # held by the thread from before it asks until it sleeps
        pass
    owner.sweeper.plan(time.monotonic() + SOON)
    assert owner.swept.acquire(timeout=PATIENCE)


def test_the_thread_sleeps_on_after_its_last_deadline_and_wakes_again(started: Started) -> None:
    manager = UserContextManager()
    for user in ("alice", "bob", "carol"):
        context = manager.create_isolated_context(user, ttl_seconds=SOON)
        wait_until(is_closed(context), f"{user}'s is closed")
    assert len(started()) == 1


def test_a_deadline_that_comes_while_the_thread_decides_is_not_lost() -> None:
    # The thread has swept, and finds nothing to wait for. At that very moment a deadline is planned.
    planning: list[threading.Thread] = []

    def nothing_yet() -> float | None:
        thread = threading.Thread(target=owner.sweeper.plan, args=(time.monotonic() + 10 * SOON,))
        planning.append(thread)
        thread.start()
        thread.join(SOON)  # planning may have to wait until the thread has decided: then this runs out
        return None

    owner = Owner(lambda: time.monotonic() + SOON, nothing_yet)
    owner.sweeper.plan(time.monotonic() + SOON)
    for _ in range(3):
        assert owner.swept.acquire(timeout=PATIENCE)
    planning[0].join(PATIENCE)


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
def test_the_thread_ends_with_its_manager(started: Started) -> None:
    manager = UserContextManager()
    contexts = [manager.create_isolated_context("alice", ttl_seconds=HOUR), manager.create_isolated_context("alice")]
    (thread,) = started()
    gone = weakref.ref(manager)
    del manager, contexts
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_thread_ends_with_a_manager_that_has_nothing_left_to_wait_for(started: Started) -> None:
    manager = UserContextManager()
    wait_until(is_closed(manager.create_isolated_context("alice", ttl_seconds=SOON)), "it is closed")
    (thread,) = started()
    del manager
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_slow_release_delays_nobody_elses_expiry() -> None:
    manager, may_go_on = UserContextManager(), threading.Event()
    slow = manager.create_isolated_context("alice", ttl_seconds=SOON)
    slow.callback(may_go_on.wait, PATIENCE)
    other = manager.create_isolated_context("bob", ttl_seconds=2 * SOON)
    wait_until(is_closed(other), "the other one is closed")
    assert "closing>" in repr(slow)
    may_go_on.set()
    wait_until(is_closed(slow), "the slow one is closed too")


def test_a_slow_child_delays_nobody_elses_expiry() -> None:
    manager, may_go_on = UserContextManager(), threading.Event()
    slow = manager.create_isolated_context("alice")
    slow.create_child_context("tool").callback(may_go_on.wait, PATIENCE)
    manager.end_within(slow, SOON)  # only now that it has the child
    other = manager.create_isolated_context("bob", ttl_seconds=2 * SOON)
    wait_until(is_closed(other), "the other one is closed")
    assert "closing>" in repr(slow)
    may_go_on.set()
    wait_until(is_closed(slow), "the slow one is closed too")


def test_a_close_that_raises_does_not_end_the_sweep(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryLedger):
        def append(self, row: Row) -> None:
            if row[0] == "closed" and row[2] == "alice":
                raise OSError("no space left")
            super().append(row)

    manager = UserContextManager(ledger=Full())
    manager.create_isolated_context("alice", ttl_seconds=SOON)
    other = manager.create_isolated_context("bob", ttl_seconds=2 * SOON)
    wait_until(is_closed(other), "the next one is closed")
    later = manager.create_isolated_context("carol", ttl_seconds=SOON)
    wait_until(is_closed(later), "one that came after is closed")
    assert "no space left" in caplog.text


def test_who_never_expires_ends_nobody_elses_expiry(started: Started, make_manager: MakeManager) -> None:
    manager = make_manager()
    stranger = visitor(manager)
    stranger.bind(Principal("alice", datetime.max.replace(tzinfo=UTC)))
    other = manager.create_isolated_context("bob", ttl_seconds=SOON)
    wait_until(is_closed(other), "the other one is closed")
    assert stranger.is_open
    assert len(started()) == 1


def test_a_wake_further_away_than_a_thread_can_wait_does_not_end_it(started: Started) -> None:
    owner = Owner(lambda: 1e300, lambda: 1e300)
    owner.sweeper.plan(time.monotonic())
    for _ in range(2):
        assert owner.asked.acquire(timeout=PATIENCE)
        owner.sweeper.plan(time.monotonic())
    assert owner.asked.acquire(timeout=PATIENCE)
    assert len(started()) == 1


class NoThreads:
    """A process that cannot start a thread, for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __enter__(self) -> None:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        self.monkeypatch.setattr(threading.Thread, "start", refuse)

    def __exit__(self, *exc_info: object) -> None:
        self.monkeypatch.undo()


def test_a_thread_that_could_not_be_started_is_started_for_the_next_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = UserContextManager()
    with NoThreads(monkeypatch), pytest.raises(RuntimeError, match="new thread"):
        manager.create_isolated_context("alice", ttl_seconds=SOON)
    assert manager.get_active_contexts() == {}
    other = manager.create_isolated_context("bob", ttl_seconds=SOON)
    wait_until(is_closed(other), "one that came after is closed")


async def test_a_connection_whose_credentials_nobody_would_watch_is_not_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def identify(connection: HTTPConnection) -> Principal:
        return Principal("alice", expires_at=datetime.now(UTC) + timedelta(hours=1))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("it must not get here")

    manager = UserContextManager()
    with NoThreads(monkeypatch), pytest.raises(RuntimeError, match="new thread"):
        await exchange(UserContextMiddleware(app, manager=manager, identify=identify), http_scope())
    assert len(manager._registry) == 0


def test_credentials_that_ended_before_there_was_a_manager_are_watched_by_it() -> None:
    passed = [0.0]
    manager = UserContextManager(clock=lambda: time.monotonic() + sum(passed))
    context = create_isolated_execution_context("alice")
    context.bind(Principal("alice", expires_at=datetime.now(UTC) + timedelta(hours=1)))
    manager.set_context("alice", context)
    passed.append(HOUR + 1)
    assert manager.sweep() == 1
    assert context.lifetime.reason == "expired"


@pytest.mark.parametrize("ttl", [None, 2 * HOUR])
def test_credentials_that_a_plugin_knows_of_are_watched_too(ttl: float | None, make_manager: MakeManager) -> None:
    class Knowing:
        @hookimpl
        def ucm_bind_session(self, context: UserExecutionContext) -> None:
            context.bind(Principal("alice", expires_at=datetime.now(UTC) + timedelta(hours=1)))

    passed = [0.0]
    manager = make_manager(clock=lambda: time.monotonic() + sum(passed), plugins=[Knowing()], ttl=ttl)
    manager.create_isolated_context("bob")  # another one lives as long, and waits in front
    context = manager.create_isolated_context("alice", db_session=object())
    passed.append(HOUR + 1)
    assert manager.sweep() == 1
    assert context.lifetime.reason == "expired"


def test_what_could_not_be_closed_for_want_of_a_thread_is_closed_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    manager = UserContextManager(clock=clock)
    contexts = [manager.create_isolated_context(user, ttl_seconds=60) for user in ("alice", "bob", "carol")]
    for context in contexts[:2]:
        context.callback(int)  # something to release, for which a thread is wanted
    clock.advance(60)
    with NoThreads(monkeypatch):
        manager.sweep()
    assert [context.is_open for context in contexts] == [True, True, False]
    assert "tried again" in caplog.text
    clock.advance(2)
    manager.sweep()
    wait_until(is_closed(*contexts), "they are closed after all")


FORKING = """
import os, signal, sys, threading
from ucm_middleware import UserContextManager

def closes_at_its_deadline(user):
    done = threading.Event()
    context = manager.create_isolated_context(user)
    context.callback(done.set)
    manager.set_context(user, context, ttl_seconds=0.02)  # last: on a slow machine it may be over at once
    return done.wait(15)

manager = UserContextManager()
assert closes_at_its_deadline("alice")
context = manager.create_isolated_context("bob", ttl_seconds=3600)
child = os.fork()
if child == 0:
    ok = closes_at_its_deadline("alice") and closes_at_its_deadline("carol") and not context.is_open
    os._exit(0 if ok else 3)
assert closes_at_its_deadline("carol")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_works_again_in_a_forked_child() -> None:
    # In a process of its own, which has no threads but the sweeper's. Python 3.12 warns of a fork beside any thread.
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORKING],
        env={**os.environ, "PYTHONPATH": str(Path(ucm_middleware.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
