"""One application on one server, and steps that are taken there until the time is over."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast
from ucm_middleware.certify.coverage import Coverage
from ucm_middleware.certify.database import Settings, watched
from ucm_middleware.certify.drives import Plan, Planned
from ucm_middleware.certify.material import Material
from ucm_middleware.certify.postgres import Use
from ucm_middleware.certify.server import Process, Subject, SubjectError, start
from ucm_middleware.certify.sightings import Examiner, Place, Sighting
from ucm_middleware.certify.stage import Outcome, SignInError, Stage
from ucm_middleware.certify.steps import Connect, Restart, Step, asks_of
from ucm_middleware.certify.witness.wire import Told

_MOST_ENDS: Final = 5
"""How often a server may end by itself before it is given up."""

_LAST_WORDS: Final = 0.1
"""Seconds that is listened to the witness when all steps are taken."""

Tell = Callable[[Coverage, int], None]
"""Told of progress: the coverage so far, and how many findings there are."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long steps are taken for; with ``first`` no longer than to the first finding."""

    seconds: float
    first: bool = False


@dataclass(slots=True)
class Finding:
    """A place where users' canaries were seen by others. ``step`` is the index in the history at which it was first."""

    first: Sighting
    step: int
    pairs: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """How often, by viewer and owner."""

    @property
    def place(self) -> Place:
        return self.first.place


@dataclass(slots=True)
class Trial:
    """What a run found, and what it tried. ``history`` has all the steps that were taken."""

    coverage: Coverage
    findings: dict[Place, Finding] = field(default_factory=dict[Place, Finding])
    history: list[Step] = field(default_factory=list[Step])
    cut_short: str | None = None
    """Why it ended before its time, though it had found something."""


class Watcher:
    """Takes down what is seen, into a trial."""

    __slots__ = ("_askers", "_examiner", "_settings", "_trial")

    def __init__(self, trial: Trial, examiner: Examiner) -> None:
        self._trial = trial
        self._examiner = examiner
        self._askers: dict[int, tuple[str, str, int | None]] = {}
        self._settings = Settings(examiner)

    def begin(self, planned: Planned) -> None:
        """A step is about to be taken."""
        self._settings.begin(planned.step)
        at = len(self._trial.history)
        self._trial.history.append(planned.step)
        self._trial.coverage.step(planned.drive)
        if isinstance(planned.step, Connect):
            self._askers[planned.step.number] = planned.step.user, planned.step.route, None
            self._trial.coverage.connected(planned.step.route)
        for ask in asks_of(planned.step):
            self._askers[ask.number] = ask.user, ask.route, at

    def answered(self, outcome: Outcome) -> None:
        """A request was."""
        ask, answer = outcome.ask, outcome.answer
        self._settings.answered(outcome)
        self._trial.coverage.outcome(
            outcome, is_own=self._examiner.own(ask.user, _of_the_answer(answer.headers, answer.plain))
        )
        self._take_down(self._examiner.in_answer(ask.user, ask.route, ask.number, answer.headers, answer.plain))

    def heard(self, connect: Connect, data: bytes) -> None:
        """A WebSocket brought a message."""
        self._trial.coverage.message(connect.user, connect.route, is_own=self._examiner.own(connect.user, data))
        self._take_down(self._examiner.in_message(connect.user, connect.route, connect.number, data))

    def told(self, told: Told) -> None:
        """The witness tells of a log record or a span."""
        if told.kind == "unavailable":
            self._trial.coverage.not_looked_at[told.where] = told.text
        elif told.kind in ("log", "span") and told.number in self._askers:
            user, route, at = self._askers[told.number]
            seen = self._examiner.in_text(told.kind, user, route, told.number, told.where, told.text)
            self._take_down(seen, at)

    def used(self, use: Use) -> None:
        """A connection to the database is used again, with settings on it."""
        self._take_down(self._settings.sightings(use))

    def refused(self, connect: Connect) -> None:
        """A WebSocket was not accepted."""
        self._trial.coverage.refused(connect.route)

    def _take_down(self, sightings: Iterable[Sighting], at: int | None = None) -> None:
        """``at`` is the step that it belongs to, where that may be an earlier one than the last."""
        findings, last = self._trial.findings, len(self._trial.history) - 1
        for one in sightings:
            found = findings.get(one.place)
            if found is None:
                found = findings[one.place] = Finding(one, last if at is None else at)
            pair = one.viewer, one.owner
            found.pairs[pair] = found.pairs.get(pair, 0) + 1


def _of_the_answer(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    return b"\n".join([*(value for _, value in headers), body])


@dataclass(slots=True)
class House:
    """Keeps the server running: restarts it when it is asked to, and when it has ended by itself."""

    subject: Subject
    hear: Callable[[Told], None]
    process: Process | None = None
    written: int = 0
    _open: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self) -> int:
        """Start it, or start it again. Returns its port. Raises SubjectError."""
        await self.aclose()
        self.process = await self._open.enter_async_context(start(self.subject, self.hear))
        return self.process.port

    async def aclose(self) -> None:
        """End it."""
        if self.process is not None:
            self.written += self.process.size
        await self._open.aclose()
        self._open = AsyncExitStack()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended without being told to."""
        return self.process is not None and self.process.returncode is not None


@asynccontextmanager
async def staged(
    cast: Cast, material: Material, canaries: Canaries, house: House, watcher: Watcher
) -> AsyncGenerator[Stage]:
    """A server that runs, and the users signed in. Raises SubjectError, SignInError."""
    async with watched(house.subject, watcher.used, watcher.told) as house.subject:
        try:
            port = await house.open()
            stage = Stage(cast, material, canaries, port, watcher.heard, watcher.refused, house.open)
            try:
                await stage.sign_all_in()
                yield stage
            finally:
                await stage.aclose()
        finally:
            await house.aclose()  # whatever becomes of the rest: no server is left running


async def take_all(stage: Stage, steps: Iterable[Planned], house: House, watcher: Watcher, trial: Trial) -> None:
    """Take steps, one after another. Raises SubjectError when the server ends again and again."""
    for planned in steps:
        watcher.begin(planned)
        for outcome in await _taken(stage, planned.step, trial):
            watcher.answered(outcome)
        if house.has_ended:
            trial.coverage.ends += 1
            if trial.coverage.ends >= _MOST_ENDS:
                assert house.process is not None
                raise SubjectError(
                    f"the server ended by itself {_MOST_ENDS} times, the last time after: {planned.step}",
                    house.process.output,
                )
            await _taken(stage, Restart(), trial)


async def _taken(stage: Stage, step: Step, trial: Trial) -> Sequence[Outcome]:
    """A sign-in that fails in the middle, since there were too many for example, ends nothing but is told of."""
    try:
        return await stage.take(step)
    except SignInError as error:
        trial.coverage.without["sign out and in"] = f"in the middle of the run {error}"
        return []


async def run_trial(
    subject: Subject, plan: Plan, examiner: Examiner, canaries: Canaries, budget: Budget, tell: Tell
) -> Trial:
    """Take the plan's steps as long as the budget says. Raises SubjectError, SignInError."""
    trial = Trial(Coverage.of(plan.material))
    trial.coverage.without.update(plan.without)
    watcher = Watcher(trial, examiner)
    house = House(subject, watcher.told)
    async with staged(plan.cast, plan.material, canaries, house, watcher) as stage:
        try:
            await take_all(stage, _within(budget, plan.steps(), trial, tell), house, watcher, trial)
        except SubjectError as error:
            if not trial.findings:
                raise
            trial.cut_short = str(error)
        await asyncio.sleep(_LAST_WORDS)
        if trial.coverage.drives["others' ids"] and not stage.was_told_ids:
            trial.coverage.without["others' ids"] = "no answer told an id that a path takes: they were only guessed"
    trial.coverage.output = house.written
    return trial


def _within(budget: Budget, steps: Iterable[Planned], trial: Trial, tell: Tell) -> Iterable[Planned]:
    clock = asyncio.get_running_loop().time
    until = clock() + budget.seconds
    for planned in steps:
        if clock() >= until or (budget.first and trial.findings):
            return
        tell(trial.coverage, len(trial.findings))
        yield planned


async def replay(
    subject: Subject, cast: Cast, material: Material, examiner: Examiner, canaries: Canaries, steps: Iterable[Step]
) -> Trial:
    """Take these steps on a server of their own. Raises SubjectError, SignInError."""
    trial = Trial(Coverage.of(material))
    watcher = Watcher(trial, examiner)
    house = House(subject, watcher.told)
    async with staged(cast, material, canaries, house, watcher) as stage:
        await take_all(stage, (Planned("tour", step) for step in steps), house, watcher, trial)
        await asyncio.sleep(_LAST_WORDS)
    return trial
