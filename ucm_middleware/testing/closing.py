"""Letting go of a manager at the end of a test."""

# Contexts, their manager and the helpers open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.lifetime import State
from ucm_middleware.manager import UserContextManager
from ucm_middleware.testing.leaks import problem_of
from ucm_middleware.testing.waiting import wait_until
from ucm_middleware.waiting import loop_is_live

ManagerT = TypeVar("ManagerT", bound=UserContextManager)


@contextmanager
def closing_contexts(manager: ManagerT) -> Generator[ManagerT]:
    """``with closing_contexts(manager):`` closes what is live in the manager at the end of the block.

    For synchronous fixtures: an event loop that stands still is run until the resources that were opened on it are
    released, one that runs in another thread is waited for. Raises AssertionError that names each resource that could
    not be released, as happens when its loop has ended.
    """
    contexts: list[UserExecutionContext] = []
    try:
        yield manager
    finally:
        contexts += (context for _, context in manager._registry.live())
        contexts += manager._closing
        for context in contexts:
            _close(context)
    if problems := [problem for context in contexts if (problem := problem_of(context)) is not None]:
        raise AssertionError(
            "contexts could not be closed after the test; close them in it, while their event loop runs:"
            + "".join(f"\n  {problem}" for problem in problems)
        )


def _close(context: UserExecutionContext) -> None:
    lifetime = context.lifetime
    loop = lifetime.loop
    if loop is None or loop.is_closed():
        context.close("shutdown")
    elif not loop.is_running():
        loop.run_until_complete(context.aclose("shutdown"))
    else:
        context.close("shutdown")
    if loop is None or loop_is_live(loop):
        wait_until(lambda: lifetime.state is State.CLOSED, f"{context!r} is closed")
