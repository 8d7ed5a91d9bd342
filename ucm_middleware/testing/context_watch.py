"""Finds the contexts that a test has left behind."""

# Contexts, their manager and the helpers open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.lifetime import State
from ucm_middleware.testing.leaks import Owner, existing_contexts, may_still_close, needs_closing, problem_of
from ucm_middleware.testing.waiting import wait_until

GRACE: Final = 5.0
"""Seconds that a teardown under way in another thread gets to end. A server's client has its answer before that."""

SETTLING: Final = 100
"""After how many looks what has gathered meanwhile, such as modules and caches, is taken out of those to come."""

NOBODY: Final = Owner("")
"""Has what was there before the tests, and what has been reported."""


class ContextWatch:
    """Looks through the objects that the garbage collector knows, once for each test; nothing is noted in between.

    So that contexts which were dropped while open are seen too, UserExecutionContext has a finalizer from ``start`` to
    ``stop``. A context that is in nobody's name belongs to the test that is running.
    """

    __slots__ = ("_dropped", "_looks", "_owners")

    def __init__(self) -> None:
        self._looks = 0
        self._owners: dict[int, Owner] = {}  # by id(): the finalizer takes out whatever goes
        self._dropped: list[tuple[str, Owner | None]] = []

    def start(self) -> None:
        """Begin to watch."""

        def note(context: UserExecutionContext) -> None:
            self._note_dropped(context)

        # No assignment: type checkers know of no such method, and should not.
        setattr(UserExecutionContext, "__del__", note)  # noqa: B010

    def forgive(self) -> None:
        """What is there now is nobody's."""
        self._owners.update((id(context), NOBODY) for context in existing_contexts())
        gc.freeze()  # what is frozen is not walked: each look goes through what came since, not through all modules

    def stop(self) -> None:
        """Watch no longer."""
        delattr(UserExecutionContext, "__del__")
        gc.unfreeze()

    @contextmanager
    def owned_by(self, owner: Owner) -> Generator[None]:
        """What is opened in the block, if it ends well, is this owner's."""
        before = {id(context) for context in existing_contexts()}
        yield
        for context in existing_contexts():
            if id(context) not in before:
                self._owners.setdefault(id(context), owner)

    def findings(self, let_go: Callable[[], object]) -> list[str]:
        """What is left behind, now that a test has ended. Nothing is found twice.

        ``let_go`` drops what the test's fixtures returned, which pytest still holds.
        """
        left = self._left()
        if any(not needs_closing(context) for context in left):
            # Only data: it counts if something refers to it, and not while it waits for the garbage collector.
            del left
            let_go()
            gc.collect()
            left = self._left()
        if any(map(may_still_close, left)):
            with suppress(TimeoutError):
                wait_until(lambda: not any(map(may_still_close, left)), "what is under way has ended", timeout=GRACE)
            left = self._left()
        among: set[Any] = set(left)  # the children of a context that is told of are not told of as well
        found = [
            _told(problem_of(context), self._owners.get(id(context)))
            for context in left
            if context._parent not in among
        ]
        self._owners.update((id(context), NOBODY) for context in left)
        dropped, self._dropped = self._dropped, []
        for problem, owner in dropped:
            if _is_kept(owner):
                self._dropped.append((problem, owner))
            else:
                found.append(_told(problem, owner))
        self._looks += 1
        if self._looks % SETTLING == 0:
            self._settle()
        return found

    def overlook(self) -> None:
        """Whatever a test has left behind is nobody's from now on."""
        self._owners.update((id(context), NOBODY) for context in self._left())
        self._dropped = [(problem, owner) for problem, owner in self._dropped if _is_kept(owner)]

    def _settle(self) -> None:
        """Freeze what there is, if no context among it can be asked about any more.

        Done again and again, since a look takes as long as there are objects, and any test may thaw all of them.
        """
        gc.collect()  # what is frozen is not collected either
        if all(self._owners.get(id(each)) is NOBODY or problem_of(each) is None for each in existing_contexts()):
            gc.freeze()

    def _left(self) -> list[UserExecutionContext]:
        return [
            context
            for context in existing_contexts()
            if not _is_kept(self._owners.get(id(context))) and problem_of(context) is not None
        ]

    def _note_dropped(self, context: UserExecutionContext) -> None:
        owner = self._owners.pop(id(context), None)
        if owner is NOBODY or not needs_closing(context) or context._parent is not None:
            return
        problem = problem_of(context)
        if problem is not None:
            dropped = "" if context.lifetime.state is State.CLOSED else "dropped while "
            self._dropped.append((dropped + problem, owner))


def _is_kept(owner: Owner | None) -> bool:
    """Whether a context is somebody else's than the test's that has just ended, and may be there."""
    return owner is not None and not owner.ended


def _told(problem: str | None, owner: Owner | None) -> str:
    return f"a context {problem}" + ("" if owner is None else f"; made by {owner.name}")
