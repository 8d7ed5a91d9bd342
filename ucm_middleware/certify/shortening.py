"""The shortest steps that show a finding: looked for on servers that are started anew for each attempt."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ucm_middleware.certify.sightings import Sighting
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Say, SignIn, SignOut, Step, Together, requests_of
from ucm_middleware.certify.trial import Finding, Trial

Replay = Callable[[Sequence[Step]], Awaitable[Trial]]
"""Takes steps on a server of their own."""

_ATTEMPTS: Final = 60
"""For one finding."""

_SOURCES: Final = 8
"""Earlier requests of the owner's that are tried as the reason."""

_MATES: Final = 8
"""Last steps of which those on the same connection are tried."""

_WINDOWS: Final = (8, 40)
"""Last steps that are tried when no pair of them shows it."""


@dataclass(frozen=True, slots=True)
class Shortest:
    """``steps`` show the finding. Where ``reproduced`` is false, no attempt did, and these are its last steps."""

    steps: tuple[Step, ...]
    reproduced: bool
    attempts: int


class Shortening:
    """Of one finding. ``is_over`` says when no further attempt may begin; ``hint`` is what showed it while another was
    looked for.
    """

    __slots__ = ("_attempts", "_finding", "_hint", "_history", "_is_over", "_replay")

    def __init__(
        self,
        finding: Finding,
        history: Sequence[Step],
        replay: Replay,
        is_over: Callable[[], bool],
        hint: Sequence[Step] | None,
    ) -> None:
        self._finding = finding
        self._history = history[: finding.step + 1]
        self._replay = replay
        self._is_over = is_over
        self._hint = hint
        self._attempts = 0

    async def shortest(self) -> Shortest:
        """Try likely pairs first, then ever longer ends of the history; then leave out what can be."""
        for candidate in self._candidates():
            if await self._shows(candidate):
                return Shortest(tuple(await self._reduced(list(candidate))), True, self._attempts)
        return Shortest(tuple(self._history[-_WINDOWS[0] :]), False, self._attempts)

    async def _shows(self, steps: Sequence[Step]) -> bool:
        if self._attempts >= _ATTEMPTS or self._is_over():
            return False
        self._attempts += 1
        trial = await self._replay(steps)
        return self._finding.place.near in {place.near for place in trial.findings}

    def _candidates(self) -> Iterator[Sequence[Step]]:
        if self._hint is not None:
            yield self._hint
        first = self._finding.first
        *before, last = self._history
        if first.place.channel == "event":
            yield self._of_the_rooms(first)
        else:
            alone = _alone(last, first.number)
            sources = [*self._sources(before, first)]
            mates = _mates(before, alone.line) if isinstance(alone, Ask | SignIn | SignOut) else []
            yield [alone]
            if isinstance(last, Together):
                yield [last]
            if isinstance(alone, Ask) and not alone.line.startswith(f"{alone.user}."):
                yield [*mates, alone]
            for end in ([alone], [last], [*mates, alone]):
                yield from ([source, *end] for source in sources if source not in end)
        for size in _WINDOWS:
            yield self._history[-size:]

    def _sources(self, before: Sequence[Step], first: Sighting) -> Iterator[Step]:
        """What the owner did: the request that brought the canary in, or the newest of each kind."""
        kinds: set[tuple[str, str, bool]] = set()
        for step in reversed(before):
            for one in requests_of(step):
                if one.user != first.owner or (first.source is not None and one.number != first.source):
                    continue
                manner, padding = (one.manner, one.padding) if isinstance(one, Ask) else ("whole", 0)
                kind = one.route, manner, bool(padding)
                if kind not in kinds and len(kinds) < _SOURCES:
                    kinds.add(kind)
                    yield one

    def _of_the_rooms(self, first: Sighting) -> Sequence[Step]:
        """The WebSockets of viewer and owner, and what the owner said."""
        users = {first.viewer, first.owner}
        kept: list[Step] = []
        for step in reversed(self._history):
            if isinstance(step, Connect | Say | HangUp) and step.user in users:
                kept.append(step)
            if isinstance(step, Connect) and {one.user for one in kept if isinstance(one, Connect)} == users:
                break
        return kept[::-1]

    async def _reduced(self, steps: list[Step]) -> list[Step]:
        """Leave out halves, quarters and so on; then parts of a step; then what is special about it."""
        size = max(1, len(steps) // 2)
        while len(steps) > 1:
            steps = await self._without_parts(steps, size)
            if size == 1:
                break
            size //= 2
        for at in range(len(steps)):
            for simpler in (_smaller, _plainer):
                steps = await self._simplified(steps, at, simpler)
        return steps

    async def _without_parts(self, steps: list[Step], size: int) -> list[Step]:
        at = 0
        while at < len(steps) > size:
            without = steps[:at] + steps[at + size :]
            if await self._shows(without):
                steps = without
            else:
                at += size
        return steps

    async def _simplified(self, steps: list[Step], at: int, simpler: Callable[[Step], Iterator[Step]]) -> list[Step]:
        """Put something simpler in place of a step, as long as that shows it."""
        found = True
        while found:
            found = False
            for one in simpler(steps[at]):
                changed = [*steps[:at], one, *steps[at + 1 :]]
                if await self._shows(changed):
                    steps, found = changed, True
                    break
        return steps


def _smaller(step: Step) -> Iterator[Step]:
    """The same with one request less, and alone where it is the last."""
    if isinstance(step, Together) and len(step.asks) > 1:
        for at in range(len(step.asks)):
            asks = step.asks[:at] + step.asks[at + 1 :]
            yield asks[0] if len(asks) == 1 else Together(asks, step.http2)


def _alone(step: Step, number: int) -> Step:
    return next((one for one in requests_of(step) if one.number == number), step)


def _mates(before: Sequence[Step], line: str) -> list[Step]:
    """What went over the same connection just before."""
    return [
        step
        for step in before[-_MATES:]
        if any(not isinstance(one, Connect) and one.line == line for one in requests_of(step))
    ]


def _plainer(step: Step) -> Iterator[Step]:
    """The same on the user's own connection, without padding, and as clients mean to."""
    if isinstance(step, Ask):
        plain = replace(step, line=f"{step.user}.0", padding=0, manner="whole")
        if plain != step:
            yield plain
