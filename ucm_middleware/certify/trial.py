"""One application on one server, and steps that are taken there until the time is over."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast
from ucm_middleware.certify.coverage import Coverage
from ucm_middleware.certify.database import Settings, watched
from ucm_middleware.certify.drives import Plan, Planned, first_sign_ins
from ucm_middleware.certify.house import House
from ucm_middleware.certify.material import Material
from ucm_middleware.certify.postgres import Use
from ucm_middleware.certify.server import Subject, SubjectError
from ucm_middleware.certify.sightings import Examiner, Place, Sighting
from ucm_middleware.certify.stage import Outcome, Stage
from ucm_middleware.certify.steps import Connect, Restart, SignIn, Step, requests_of
from ucm_middleware.certify.witness.wire import Told
from ucm_middleware.errors import ConfigurationError

_MOST_ENDS: Final = 5
"""How often a server may end by itself before it is given up."""

_LAST_WORDS: Final = 0.1
"""Seconds that is listened to the witness when all steps are taken."""

Tell = Callable[[Coverage, int], None]
"""Told of progress: the coverage so far, and how many findings there are."""


class SignInError(ConfigurationError):
    """A user could not sign in at the beginning."""


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
    """Why it ended before its time."""
    given: Iterable[str] = field(default=(), repr=False)
    """Credentials that users were given."""


class Watcher:
    """Takes down what is seen, into a trial."""

    __slots__ = ("_askers", "_examiner", "_settings", "_trial")

    def __init__(self, trial: Trial, examiner: Examiner) -> None:
        self._trial = trial
        self._examiner = examiner
        self._askers: dict[int, tuple[str, str, int | None]] = {}
        self._settings = Settings(examiner)

    def begin(self, step: Step) -> None:
        """A step is about to be taken."""
        self._settings.begin(step)
        at: int | None = len(self._trial.history)
        self._trial.history.append(step)
        if isinstance(step, Connect):
            self._trial.coverage.connected(step.route)
            at = None
        for request in requests_of(step):
            self._askers[request.number] = request.user, request.route, at

    def answered(self, outcome: Outcome) -> None:
        """A request was."""
        request, answer = outcome.request, outcome.answer
        self._settings.answered(outcome)
        is_own = self._examiner.own(request.user, _of_the_answer(answer.headers, answer.plain))
        if isinstance(request, Connect):
            self._trial.coverage.handshake(request.route, answer, is_own=is_own)
        else:
            self._trial.coverage.outcome(outcome, is_own=is_own)
        self._take_down(
            self._examiner.in_answer(request.user, request.route, request.number, answer.headers, answer.plain)
        )

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

    def closed(self, connect: Connect, reason: str) -> None:
        """A WebSocket was, by the server."""
        where = "reason of the close"
        seen = self._examiner.in_text("event", connect.user, connect.route, connect.number, where, reason)
        self._take_down(seen)

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


@asynccontextmanager
async def staged(
    cast: Cast, material: Material, canaries: Canaries, house: House, watcher: Watcher
) -> AsyncGenerator[Stage]:
    """A server that runs, and nobody signed in yet. Raises SubjectError."""
    async with watched(house.subject, watcher.used, watcher.told) as house.subject:
        try:
            port = await house.open()
            stage = Stage(cast, material, canaries, port, watcher.heard, watcher.closed, house.open)
            try:
                yield stage
            finally:
                await stage.aclose()
        finally:
            await house.aclose()  # whatever becomes of the rest: no server is left running


async def take_all(
    stage: Stage, steps: Iterable[Planned], restart: Restart, house: House, watcher: Watcher, trial: Trial
) -> None:
    """Take steps, one after another, and ``restart`` where the server has ended.

    Raises SubjectError when it ends again and again.
    """
    for planned in steps:
        trial.coverage.step(planned.drive)
        watcher.begin(planned.step)
        await _take(stage, planned.step, watcher, trial)
        if house.has_ended:
            trial.coverage.ends += 1
            if trial.coverage.ends >= _MOST_ENDS:
                assert house.process is not None
                raise SubjectError(
                    f"the server ended by itself {_MOST_ENDS} times, the last time after: {planned.step}",
                    house.process.output,
                )
            await _take(stage, restart, watcher, trial)
        if stage.is_deserted:
            trial.cut_short = "nobody is signed in any more, nor can sign in"
            return


async def _take(stage: Stage, step: Step, watcher: Watcher, trial: Trial) -> None:
    """A sign-in that fails in the middle, since there were too many for example, ends nothing but is told of."""
    for outcome in await stage.take(step):
        watcher.answered(outcome)
        if outcome.wrong is not None:
            user = outcome.request.user
            trial.coverage.not_signed_in(user, outcome.wrong, goes_on=stage.takes_part(user))


async def _sign_in(stage: Stage, step: SignIn) -> Sequence[Outcome]:
    """At the beginning. Raises SignInError."""
    outcomes = await stage.take(step)
    for outcome in outcomes:
        if outcome.wrong is not None:
            raise SignInError(outcome.wrong)
    return outcomes


async def run_trial(
    subject: Subject, plan: Plan, examiner: Examiner, canaries: Canaries, budget: Budget, tell: Tell
) -> Trial:
    """Take the plan's steps as long as the budget says. Raises SubjectError, SignInError."""
    trial = Trial(Coverage.of(plan.material))
    trial.coverage.without.update(plan.without)
    watcher = Watcher(trial, examiner)
    house = House(subject, watcher.told)
    async with staged(plan.cast, plan.material, canaries, house, watcher) as stage:
        trial.given = stage.given
        for step in plan.sign_ins:
            watcher.begin(step)
            for outcome in await _sign_in(stage, step):
                watcher.answered(outcome)
        restart = Restart(plan.sign_ins)
        try:
            await take_all(stage, _within(budget, plan.steps(), trial, tell), restart, house, watcher, trial)
        except SubjectError as error:
            if not trial.findings:
                error.given = frozenset(trial.given)
                raise
            trial.cut_short = str(error)
        await asyncio.sleep(_LAST_WORDS)
        if trial.coverage.drives["others' ids"] and not stage.was_told_ids:
            trial.coverage.without["others' ids"] = (
                "no answer told an id that a path takes and that others can ask by: they were only guessed"
            )
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
    subject: Subject, cast: Cast, material: Material, examiner: Examiner, canaries: Canaries, steps: Sequence[Step]
) -> Trial:
    """Take these steps on a server of their own, where whoever does not sign in first has signed in before them.

    Raises SubjectError, SignInError.
    """
    trial = Trial(Coverage.of(material))
    watcher = Watcher(trial, examiner)
    house = House(subject, watcher.told)
    async with staged(cast, material, canaries, house, watcher) as stage:
        sign_ins, by_steps = first_sign_ins(cast), _sign_in_first(steps)
        for step in sign_ins:
            if step.user not in by_steps:
                await _sign_in(stage, step)
        planned = (Planned("tour", step) for step in steps)
        await take_all(stage, planned, Restart(sign_ins), house, watcher, trial)
        await asyncio.sleep(_LAST_WORDS)
    return trial


def _sign_in_first(steps: Iterable[Step]) -> set[str]:
    """The users who do nothing in these steps before they sign in."""
    first: dict[str, bool] = {}
    for step in steps:
        for one in requests_of(step):
            first.setdefault(one.user, isinstance(one, SignIn))
    return {user for user, signs_in in first.items() if signs_in}
