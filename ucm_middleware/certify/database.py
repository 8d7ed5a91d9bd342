"""Settings of the database that one user left on a connection, in force when another's request is answered with it."""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from ucm_middleware.certify.postgres import Tap, Use, tap
from ucm_middleware.certify.server import Subject
from ucm_middleware.certify.sightings import Examiner, Place, Sighting
from ucm_middleware.certify.stage import Outcome
from ucm_middleware.certify.steps import Ask, Step
from ucm_middleware.certify.witness.wire import Told
from ucm_middleware.errors import ConfigurationError

_CHANNEL: Final = "setting"

_LINGERING: Final = 0.25
"""Seconds for which the server may still be at work on a request that was dropped, or not answered in time."""


class Settings:
    """Which request the use of a connection belongs to, and whose the settings on it are."""

    __slots__ = ("_ask", "_begun", "_clock", "_examiner", "_names", "_settled", "_word")

    def __init__(self, examiner: Examiner) -> None:
        self._examiner = examiner
        self._names = {name.lower(): name for name in examiner.users}
        # Of two names that begin alike the longer one.
        longest = "|".join(re.escape(name) for name in sorted(self._names, key=len, reverse=True))
        self._word = re.compile(rf"(?<![^\W_])(?:{longest})(?![^\W_])", re.IGNORECASE)
        self._clock = asyncio.get_running_loop().time
        self._ask: Ask | None = None
        self._begun = 0.0
        self._settled = 0.0

    def begin(self, step: Step) -> None:
        """A step is about to be taken. With several requests at a time nobody knows which one a connection is for."""
        self._begun = self._clock()
        self._ask = step if isinstance(step, Ask) and self._begun >= self._settled else None

    def answered(self, outcome: Outcome) -> None:
        """A request was, or it was given up."""
        self._ask = None
        if outcome.answer.ending != "complete":
            self._settled = self._clock() + _LINGERING

    def sightings(self, use: Use) -> Iterator[Sighting]:
        """What of others is in force. What came about since the request began may be another's, in the background."""
        ask = self._ask
        if ask is None or use.since > self._begun:
            return
        for name, value in use.settings.items():
            with_canary = [*self._examiner.in_text("setting", ask.user, ask.route, ask.number, name, value)]
            yield from with_canary
            owners = self._named(value) - {ask.user, *(one.owner for one in with_canary)}
            if self._examiner.is_private(ask.route):
                place = Place("setting", ask.route, name)
                yield from (Sighting(place, ask.user, owner, ask.number, None) for owner in sorted(owners))

    def _named(self, value: str) -> set[str]:
        return {self._names[found.lower()] for found in self._word.findall(value)}


@asynccontextmanager
async def watched(
    subject: Subject, used: Callable[[Use], None], tell: Callable[[Told], None]
) -> AsyncGenerator[Subject]:
    """The same application with a tap at its database. What cannot be looked at is told like the witness does.

    Raises ConfigurationError for a variable that is not set, and for a DSN that the tap cannot take.
    """
    variable = subject.database
    if variable is None:
        tell(_unavailable("no --database-variable says where the application finds its PostgreSQL"))
        yield subject
        return
    dsn = {**os.environ, **subject.env}.get(variable)
    if not dsn:
        raise ConfigurationError(f"--database-variable {variable}: it is not set; set it to the database's DSN")
    async with tap(dsn, used) as made:
        yield replace(subject, env={**subject.env, variable: made.dsn})
        if (missing := _missing(made, variable)) is not None:
            tell(_unavailable(missing))


def _missing(made: Tap, variable: str) -> str | None:
    if not made.connections:
        return f"the application made no connection to the database that {variable} names"
    if made.unwatched:
        return f"{made.unwatched} of {made.connections} connections could not be followed"
    return None


def _unavailable(why: str) -> Told:
    return Told("unavailable", where=_CHANNEL, text=why)
