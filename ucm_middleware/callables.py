"""What runs where something is called, whatever it is that is called."""

import inspect
from functools import partial


def body_of(call: object) -> object:
    """The function behind a callable: of a partial the one that it is of, of an object its class's ``__call__``."""
    while isinstance(call, partial):
        call = call.func
    if inspect.isroutine(call) or isinstance(call, type):
        return call
    return getattr(type(call), "__call__", None)  # noqa: B004 - it is asked what it is, not whether it is there


def is_asynchronous(call: object) -> bool:
    """Whether what it gives is to be awaited. An object may say so of itself, or have a ``__call__`` that does."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(body_of(call))
