"""Finds what a test leaves running in contexts that it closed: tasks, timers, threads, queued jobs, kept generators."""

import asyncio
import gc
import weakref
from contextlib import suppress
from contextvars import Context
from typing import Any, Final, NamedTuple

from ucm_middleware.census.census import Census, references, search
from ucm_middleware.census.holder import Holder
from ucm_middleware.census.survey import survey
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.testing.waiting import wait_until
from ucm_middleware.waiting import running_loop

GRACE: Final = 2.0
"""Seconds that a thread gets to end."""

SEARCH_SECONDS: Final = 1.0
"""How long the heap is searched for what keeps a context, for each that is still there."""


class Suspect(NamedTuple):
    """A context that a census suspects."""

    census: Census
    context: "weakref.ref[UserExecutionContext]"
    expected: int | None


class Started(NamedTuple):
    """A task, or the handle of a timer, that was still there a turn of the loop after its context had closed."""

    work: Any
    loop: asyncio.AbstractEventLoop
    text: str

    @property
    def is_left(self) -> bool:
        """Whether it never came to its own end: a loop that is closed cancels what it has."""
        if isinstance(self.work, asyncio.TimerHandle):
            return not self.work.cancelled() and self.work.when() > self.loop.time()
        return not self.work.done() or self.work.cancelled()


class HeldWatch:
    """Listens to the census of every manager: which contexts it suspects.

    Tasks and timers are noted a turn later in the test's own event loop, which takes them along when it ends; those
    that come to their own end before the test does are none. What does not end with a loop is looked for after the
    test, so that a thread which was only about to end is none either.
    """

    __slots__ = ("_started", "_suspect", "_suspects")

    def __init__(self) -> None:
        self._suspect = Census.suspect
        self._suspects: list[Suspect] = []
        self._started: list[Started] = []

    def start(self) -> None:
        """Begin to watch."""

        def suspect(census: Census, context: UserExecutionContext, expected: int | None) -> None:
            suspected = Suspect(census, weakref.ref(context), expected)
            self._suspects.append(suspected)
            self._suspect(census, context, expected)
            loop = running_loop()
            if loop is not None:
                loop.call_soon(self._look, suspected, loop, context=Context())

        setattr(Census, "suspect", suspect)  # noqa: B010 - for the session only, so none that type checkers know of

    def stop(self) -> None:
        """Watch no longer."""
        setattr(Census, "suspect", self._suspect)  # noqa: B010

    def overlook(self) -> None:
        """Whatever a test has left behind is nobody's from now on."""
        self._suspects.clear()
        self._started.clear()

    def findings(self) -> list[str]:
        """What is left running, now that a test has ended. Nothing is found twice."""
        found = list(dict.fromkeys(one.text for one in self._started if one.is_left))
        self._started.clear()  # what is done must not be what holds a context
        if self._suspects:
            gc.collect()
            found += [text for text in self._still_running() if text not in found]
        self.overlook()
        return found

    def _look(self, suspect: Suspect, loop: asyncio.AbstractEventLoop) -> None:
        context = _held(suspect)
        if context is None:
            return
        for holder in suspect.census.not_allowed(survey((context,)).get(context, ())):
            work = getattr(holder.cancel, "__self__", None)  # the task or the handle
            if work is not None:
                self._started.append(Started(work, loop, _told(context, holder)))

    def _still_running(self) -> list[str]:
        held = {context: suspect for suspect in self._suspects if (context := _held(suspect)) is not None}
        if not held:
            return []
        with suppress(TimeoutError):
            wait_until(lambda: not survey(held), "the threads have ended", timeout=GRACE)
        running = survey(held)
        gc.unfreeze()  # what is frozen is in no search
        unexplained = {context: False for context in held if context not in running}
        found_there = search(unexplained, SEARCH_SECONDS, without=(held,))
        found: list[str] = []
        for context, suspect in held.items():
            holders = [*running.get(context, ())]
            if context in found_there:
                holders.append(found_there[context])
            found += [_told(context, one) for one in suspect.census.not_allowed(holders) if one.kind != "reference"]
        return found


def _held(suspect: Suspect) -> UserExecutionContext | None:
    context = suspect.context()
    return None if context is None or references(context) == suspect.expected else context


def _told(context: UserExecutionContext, holder: Holder) -> str:
    about = f"context of user {context.user_id!r} ({context.request_id}), opened by {context.lifetime.where()}"
    return f"a {holder} that goes on in a closed context: {about}"
