"""Finds what a test leaves running in contexts that it closed: tasks, timers, threads, queued jobs, kept generators."""

# Contexts, their manager and the helpers open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import gc
import weakref
from contextlib import suppress
from contextvars import Context
from typing import Final

from ucm_middleware.census.census import Census, references, search
from ucm_middleware.census.holder import Holder
from ucm_middleware.census.survey import survey
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.testing.waiting import wait_until

GRACE: Final = 5.0
"""Seconds that a thread gets to end. A server's client has its answer before that."""

SEARCH_SECONDS: Final = 1.0
"""How long the heap is searched for what keeps a context, for each that is still there."""


class HeldWatch:
    """Listens to the census of every manager: which contexts it suspects.

    Tasks and timers are looked for a turn later in the test's own event loop, which takes them along when it ends. What
    does not end with the loop is looked for after the test, so that a thread which was only about to end is none.
    """

    __slots__ = ("_suspect", "_suspects", "_told")

    def __init__(self) -> None:
        self._suspect = Census.suspect
        self._suspects: list[tuple[weakref.ref[UserExecutionContext], int | None]] = []
        self._told: list[str] = []

    def start(self) -> None:
        """Begin to watch."""

        def suspect(census: Census, context: UserExecutionContext, expected: int | None) -> None:
            self._suspects.append((weakref.ref(context), expected))
            self._suspect(census, context, expected)
            with suppress(RuntimeError):  # a thread without an event loop
                loop = asyncio.get_running_loop()
                loop.call_soon(self._look, census, weakref.ref(context), expected, context=Context())

        setattr(Census, "suspect", suspect)  # noqa: B010 - for the session only, so none that type checkers know of

    def stop(self) -> None:
        """Watch no longer."""
        setattr(Census, "suspect", self._suspect)  # noqa: B010

    def overlook(self) -> None:
        """Whatever a test has left behind is nobody's from now on."""
        self._suspects.clear()
        self._told.clear()

    def findings(self) -> list[str]:
        """What is left running, now that a test has ended. Nothing is found twice."""
        found = list(dict.fromkeys(self._told))
        if self._suspects:
            gc.collect()
            found += [text for text in self._still_running() if text not in found]
        self.overlook()
        return found

    def _look(self, census: Census, one: "weakref.ref[UserExecutionContext]", expected: int | None) -> None:
        context = _held(one, expected)
        if context is not None:
            running = census._not_allowed(survey((context,)).get(context, ()))
            self._told += [_told(context, holder) for holder in running if holder.kind in {"task", "timer"}]

    def _still_running(self) -> list[str]:
        held = [context for one, expected in self._suspects if (context := _held(one, expected)) is not None]
        if not held:
            return []
        with suppress(TimeoutError):
            wait_until(lambda: not survey(held), "the threads have ended", timeout=GRACE)
        running = survey(held)
        found = [_told(context, holder) for context, holders in running.items() for holder in holders]
        gc.unfreeze()  # what is frozen is in no search
        for context in held:
            if context not in running:
                holder = search(context, SEARCH_SECONDS, is_request=False, without=(held,))
                if holder is not None and holder.kind != "reference":
                    found.append(_told(context, holder))
        return found


def _held(reference: "weakref.ref[UserExecutionContext]", expected: int | None) -> UserExecutionContext | None:
    context = reference()
    return None if context is None or references(context) == expected else context


def _told(context: UserExecutionContext, holder: Holder) -> str:
    about = f"context of user {context.user_id!r} ({context.request_id}), opened by {context.lifetime.where()}"
    return f"a {holder} that goes on in a closed context: {about}"
