"""The cluster's thread: what is asked of it while it ends is answered."""

import asyncio
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from ucm_middleware.cluster.thread import ClusterThread
from ucm_middleware.errors import ClusterUnavailableError


async def _until_ended(thread: ClusterThread) -> None:
    while not thread.is_ending:
        await thread.woken.wait()
        thread.woken.clear()


async def _answer() -> str:
    return "answered"


def test_what_is_asked_while_it_ends_is_answered_or_refused() -> None:
    thread = ClusterThread(_until_ended)
    asked: list[Any] = []
    close = thread.loop.close

    def ask_before_it_is_closed() -> None:
        """The last moment at which the loop still takes something, and runs nothing any more."""
        with pytest.raises(ClusterUnavailableError):
            thread.call(_answer())
        asked.append(thread.soon(asked.clear))
        close()

    thread.loop.close = ask_before_it_is_closed  # type: ignore[method-assign]
    thread.start()
    thread.end()
    thread.ended.result(10)

    assert asked == [False]


def test_what_is_asked_in_its_last_step_is_told() -> None:
    """Also what has not begun by then: a task that is cancelled before its first step does nothing at all."""
    begun = threading.Event()

    async def last() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            told.set()

    told = threading.Event()
    tasks: list[asyncio.Task[None]] = []
    thread = ClusterThread(_until_ended)
    run = thread.loop.run_until_complete

    def ask_before_the_last(work: Any) -> None:
        if thread._is_over:
            thread.loop.call_soon_threadsafe(lambda: tasks.append(asyncio.ensure_future(last())))
        run(work)

    thread.loop.run_until_complete = ask_before_the_last  # type: ignore[method-assign, assignment]
    thread.start()
    thread.end()
    thread.ended.result(10)

    assert begun.is_set()
    assert told.is_set()


def test_what_is_under_way_when_it_ends_is_told() -> None:
    thread = ClusterThread(_until_ended)
    thread.start()
    begun = threading.Event()

    async def last() -> None:
        begun.set()
        await asyncio.Event().wait()

    future = thread.call(last())
    assert begun.wait(10)
    thread.end()

    with pytest.raises(CancelledError):
        future.result(10)
