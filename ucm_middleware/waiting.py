"""Event loops and waiting on them: what runs apart, and what is waited for whatever cancels the one who waits."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, ParamSpec

import anyio

P = ParamSpec("P")


def in_background(
    loop: asyncio.AbstractEventLoop, work: Callable[P, Coroutine[Any, Any, None]], *args: P.args, **kwargs: P.kwargs
) -> None:
    """Run a teardown in a task on ``loop``."""
    if loop is running_loop():
        # Nothing here keeps the task: it waits with a timeout, and the loop holds its timers.
        asyncio.Task(work(*args, **kwargs), loop=loop, name="context teardown")
    else:
        loop.call_soon_threadsafe(lambda: in_background(loop, work, *args, **kwargs))


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def loop_is_live(loop: asyncio.AbstractEventLoop) -> bool:
    """True when a callback given to the loop now will run."""
    return loop.is_running() and not loop.is_closed()


class Cancelled:
    """The last cancellation that arrived while something had to be finished first.

    Kept in here and not in a variable of the frames that its traceback holds, which would be a reference cycle.
    """

    __slots__ = ("_error",)

    def __init__(self) -> None:
        self._error: asyncio.CancelledError | None = None

    def keep(self, error: asyncio.CancelledError) -> None:
        self._error = error

    def raise_it(self) -> None:
        """Raise it, now that it may be; nothing when there was none."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error


async def settle(task: asyncio.Future[Any], timeout: float, cancelled: Cancelled) -> None:
    """Wait for a task or a future, for so many seconds, through any number of cancellations of the one who waits."""
    loop = asyncio.get_running_loop()
    expired: asyncio.Future[None] = loop.create_future()
    # In an empty Context: a timer keeps its own until it is due, cancelled or not, and all that is in there.
    timer = loop.call_later(timeout, wake, expired, context=Context())
    while not task.done() and not expired.done():
        try:
            await asyncio.wait((task, expired), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled.keep(error)
    timer.cancel()


async def uncancelled(waiter: asyncio.Future[None]) -> None:
    """Wait for a future that ``wake`` sets, through any number of cancellations, of which the last is raised after."""
    cancelled = Cancelled()
    with anyio.CancelScope(shield=True):
        while not waiter.done():
            try:
                await asyncio.wait((waiter,))
            except asyncio.CancelledError as error:
                cancelled.keep(error)
    cancelled.raise_it()


def wake(waiter: asyncio.Future[None]) -> None:
    """Set a future that may have been set, on its own loop."""
    if not waiter.done():
        waiter.set_result(None)
