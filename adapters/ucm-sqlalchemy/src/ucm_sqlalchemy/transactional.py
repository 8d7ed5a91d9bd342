"""Functions that run in a unit of work."""

import asyncio
import functools
import inspect
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

from sqlalchemy.exc import DBAPIError

from ucm_middleware import ConfigurationError, IsolationLevel
from ucm_middleware.transactions import checked_level
from ucm_sqlalchemy.units import UnitOfWork

if TYPE_CHECKING:
    from ucm_sqlalchemy.database import Database

P = ParamSpec("P")
R = TypeVar("R")

_WORTH_ANOTHER_TRY: Final = frozenset({"40001", "40P01"})  # serialization failure, deadlock

_FIRST_PAUSE: Final = 0.01  # seconds, at most; twice as long before each further one


def transactional(
    database: "Database[Any]", function: Callable[P, R], level: IsolationLevel | None, retries: int
) -> Callable[P, R]:
    """See ``Database.transactional``."""
    level = checked_level(level)
    if retries < 0:
        raise ConfigurationError(f"retries is {retries!r}; give a number of further tries, 0 for none")
    name = getattr(function, "__qualname__", repr(function))
    kind = type(cast("object", function))
    if issubclass(kind, classmethod | staticmethod):
        raise ConfigurationError(f"{name} is a {kind.__name__}; put that decorator above transactional")
    innermost = inspect.unwrap(function)  # of a context manager, say
    if inspect.isgeneratorfunction(innermost) or inspect.isasyncgenfunction(innermost):
        raise ConfigurationError(f"{name} is a generator, which runs when it is iterated; use unit_of_work() in it")
    if inspect.iscoroutinefunction(function) is not database.is_async:
        wanted = "async def, since its engine is an AsyncEngine" if database.is_async else "def, since it has an Engine"
        raise ConfigurationError(f"{name} cannot be transactional: with {database.name} it must be {wanted}")
    if database.is_async:
        return cast("Callable[P, R]", _asynchronous(database, cast("Any", function), level, retries))
    return _synchronous(database, function, level, retries)


def _asynchronous(database: "Database[Any]", function: Any, level: IsolationLevel | None, retries: int) -> Any:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        tries = 0
        while True:
            unit = database.unit_of_work(level)
            try:
                async with unit:
                    return await function(*args, **kwargs)
            except DBAPIError as error:
                if tries >= retries or not _can_try_again(unit, error):
                    raise
            await asyncio.sleep(_pause(tries))
            tries += 1

    return run


def _synchronous(
    database: "Database[Any]", function: Callable[P, R], level: IsolationLevel | None, retries: int
) -> Callable[P, R]:
    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tries = 0
        while True:
            unit = database.unit_of_work(level)
            try:
                with unit:
                    return function(*args, **kwargs)
            except DBAPIError as error:
                if tries >= retries or not _can_try_again(unit, error):
                    raise
            time.sleep(_pause(tries))
            tries += 1

    return run


def _can_try_again(unit: UnitOfWork[Any], error: DBAPIError) -> bool:
    # What the function has committed by itself must not be done twice.
    if unit.is_nested or unit.has_committed:
        return False
    return getattr(error.orig, "sqlstate", None) in _WORTH_ANOTHER_TRY


def _pause(tries: int) -> float:
    # Not the same for those that have failed by each other.
    return random.uniform(0, _FIRST_PAUSE * 2**tries)
