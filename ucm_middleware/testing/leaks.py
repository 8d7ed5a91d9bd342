"""What a context has left behind, in words, and where the contexts are."""

import gc
from dataclasses import dataclass
from typing import Final, cast

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.lifetime import Lifetime, State
from ucm_middleware.waiting import loop_is_live

UNRELEASED: Final = frozenset({"unclosed", "timed out", "cancelled"})
"""The outcomes after which a resource may still be held. One that failed was asked to let go, and raised."""


@dataclass(slots=True, eq=False)
class Owner:
    """A fixture of a wider scope than one test: what it sets up is its own, until it is torn down and has ``ended``."""

    name: str
    ended: bool = False


def existing_contexts() -> list[UserExecutionContext]:
    """Every context in this process, live or not, also those that only a reference cycle keeps."""
    # By type() and not isinstance(): that would ask proxies for their __class__, which is code of somebody else's.
    found = [each for each in gc.get_objects() if issubclass(type(each), UserExecutionContext)]
    return cast("list[UserExecutionContext]", found)


def problem_of(context: UserExecutionContext) -> str | None:
    """What is left of a context: that it is open, or which resources are not released. None when nothing is."""
    lifetime = lifetime_of(context)
    if lifetime is None:
        return None
    about = f"context of user {context.user_id!r} ({context.request_id}), opened by {lifetime.where()}"
    if lifetime.state is State.CLOSED:
        kept = [f"{failure.name} ({failure.outcome})" for failure in lifetime.failures if failure.outcome in UNRELEASED]
        return f"closed ({lifetime.reason}) with unreleased resources: {', '.join(kept)}; {about}" if kept else None
    state = "open" if lifetime.is_open else f"still closing ({lifetime.reason})"
    held = [name for name, _ in lifetime.targets()]
    return f"{state}, holding {', '.join(held)}: {about}" if held else f"{state}: {about}"


def needs_closing(context: UserExecutionContext) -> bool:
    """Whether the garbage collector alone does not end this context well: it has a manager, or something to release.

    A root context that was made by hand, or that a manager refused, and that holds nothing is only data.
    """
    lifetime = lifetime_of(context)
    if lifetime is None:
        return False
    return lifetime.state is State.CLOSED or context.host is not None or context.needs_waiting


def may_still_close(context: UserExecutionContext) -> bool:
    """Whether something else is at it: an event loop in another thread, a thread that releases, a sweep that is due."""
    lifetime = lifetime_of(context)
    if lifetime is None or lifetime.state is State.CLOSED:
        return False
    loop = lifetime.loop
    if loop is not None:
        return loop_is_live(loop)
    return lifetime.state is State.CLOSING or lifetime.is_expired


def lifetime_of(context: UserExecutionContext) -> Lifetime | None:
    """The state machine of a context; None for one whose constructor refused."""
    return getattr(context, "lifetime", None)
