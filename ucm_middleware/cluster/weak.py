"""Methods that keep no object alive: the cluster's thread must not keep a manager, which its contexts lead to."""

from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakMethod


def weakly(method: Callable[..., object]) -> Callable[..., None]:
    """The method as a function, which does nothing once its object is gone."""
    reference = WeakMethod(method)

    def call(*args: object) -> None:
        if (found := reference()) is not None:
            found(*args)

    return call


def weakly_soon(method: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """The same of an asynchronous method."""
    reference = WeakMethod(method)

    async def call(*args: object) -> None:
        if (found := reference()) is not None:
            await found(*args)

    return call
