"""A whole run: the application is looked at, tried, and what is found is shown by as few steps as can be."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast
from ucm_middleware.certify.coverage import Coverage
from ucm_middleware.certify.credentials import Credentials
from ucm_middleware.certify.drives import Plan
from ucm_middleware.certify.lines.http1 import Line
from ucm_middleware.certify.lines.request import Request
from ucm_middleware.certify.material import Material, make_material
from ucm_middleware.certify.plain import is_object
from ucm_middleware.certify.schema import Found, Route, combined
from ucm_middleware.certify.server import SPEAK_HTTP2, Subject, SubjectError, start
from ucm_middleware.certify.shortening import Shortening, Shortest
from ucm_middleware.certify.sightings import Channel, Examiner
from ucm_middleware.certify.sowing import Document
from ucm_middleware.certify.steps import Step
from ucm_middleware.certify.trial import Budget, Finding, SignInError, Trial, replay, run_trial
from ucm_middleware.certify.witness.wire import Order, Told
from ucm_middleware.testing.server import ServerKind

SECONDS: Final = 20.0
"""How long an application is tried unless something else is said."""

_SCHEMA: Final = "/openapi.json"

_MAKING: Final = 60.0
"""Seconds in which requests are made for the routes of a schema, hundreds of them on a slow machine."""


def any_seed() -> int:
    """One that nobody has chosen."""
    return secrets.randbelow(2**32)


@dataclass(frozen=True, slots=True)
class Options:
    """What is run, and how long. ``schema`` is a file, or a path of the application; ``shorten`` is the number of
    seconds that may be spent on finding the shortest steps. With ``first`` it ends at the first finding. ``database``
    names the variable of the environment in which the application finds its PostgreSQL.
    """

    app: str
    cast: Cast
    kind: ServerKind = "uvicorn"
    factory: bool = False
    app_dir: Path = field(default_factory=Path.cwd)
    seconds: float = SECONDS
    shorten: float = 30.0
    first: bool = False
    seed: int = field(default_factory=any_seed)
    schema: str | None = None
    skip: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    database: str | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """A finding, and the steps that show it."""

    finding: Finding
    shortest: Shortest


@dataclass(frozen=True, slots=True)
class Result:
    """Of a run. ``seconds`` is how long the steps were taken for; ``notes`` say what was wrong with what was given."""

    options: Options
    with_ucm: bool
    shown: tuple[Shown, ...]
    coverage: Coverage
    seconds: float
    notes: tuple[str, ...] = ()
    given: frozenset[str] = field(default=frozenset(), repr=False)
    """Credentials that users were given in it."""


class Progress(Protocol):
    """Told how far a run has come."""

    def stage(self, what: str, seconds: float | None) -> None:
        """Something has begun, which takes so long, or nobody knows."""

    def done(self, coverage: Coverage, findings: int) -> None:
        """Steps were taken."""


async def certify(options: Options, progress: Progress, *, with_ucm: bool = False) -> Result:
    """Run it. Raises SubjectError when the application cannot be tried, SignInError when a user cannot sign in."""
    canaries = _new_canaries(options)
    subject = _subject(options, canaries, with_ucm)
    progress.stage("looking at the application", None)
    material, notes = await _look(subject, options, progress)
    plan = Plan(options.cast, material, options.seed, has_http2=options.kind in SPEAK_HTTP2)
    examiner = Examiner(canaries, options.cast.public)
    clock = asyncio.get_running_loop().time
    progress.stage("trying it", options.seconds)
    begun = clock()
    trial = await run_trial(
        subject, plan, examiner, canaries, Budget(options.seconds, first=options.first), progress.done
    )
    took = clock() - begun

    if trial.findings:
        progress.stage("looking for the shortest steps", options.shorten)
    shown = await _shown(options, material, trial, with_ucm=with_ucm)
    if trial.cut_short is not None:
        notes = (*notes, f"it was given up before its time: {trial.cut_short}")
    return Result(options, with_ucm, tuple(shown), trial.coverage, took, notes, frozenset(trial.given))


async def _shown(options: Options, material: Material, trial: Trial, *, with_ucm: bool) -> list[Shown]:
    """Each finding with the shortest steps. What time one leaves is the others'."""
    clock = asyncio.get_running_loop().time
    end = clock() + options.shorten
    showing: dict[tuple[Channel, str], Sequence[Step]] = {}

    async def again(steps: Sequence[Step]) -> Trial:
        canaries = _new_canaries(options)
        subject = _subject(options, canaries, with_ucm)
        examiner = Examiner(canaries, options.cast.public)
        try:
            trial = await replay(subject, options.cast, material, examiner, canaries, steps)
        except (SubjectError, SignInError):
            return Trial(Coverage.of(material))  # it cannot be tried this way, and shows nothing
        for place in trial.findings:
            if place.near not in showing or len(steps) < len(showing[place.near]):
                showing[place.near] = steps
        return trial

    shown: list[Shown] = []
    for left, finding in zip(range(len(trial.findings), 0, -1), trial.findings.values(), strict=True):
        until = clock() + max(0.0, end - clock()) / left
        hint = showing.get(finding.place.near)
        shortening = Shortening(finding, trial.history, again, _passed(clock, until), hint)
        shown.append(Shown(finding, await shortening.shortest()))
    return shown


def _new_canaries(options: Options) -> Canaries:
    """Others each time, so that nothing which an earlier run left in a database is taken for something of this one."""
    return Canaries(options.cast, secrets.randbits(64))


def _passed(clock: Callable[[], float], until: float) -> Callable[[], bool]:
    return lambda: clock() >= until


def _subject(options: Options, canaries: Canaries, with_ucm: bool) -> Subject:
    order = Order(options.app, options.factory, canaries.patterns(), options.cast.names if with_ucm else None)
    return Subject(order, options.kind, options.app_dir, options.env, options.database)


async def _look(subject: Subject, options: Options, progress: Progress) -> tuple[Material, tuple[str, ...]]:
    """Start the application once, for its routes."""
    found: list[Found] = []
    has_told = asyncio.Event()

    def hear(told: Told) -> None:
        if told.kind == "routes":
            found.extend(Found(*route) for route in told.routes)
            has_told.set()

    async with start(subject, hear) as process:
        document, notes = await _document(process.port, options)
        await asyncio.wait_for(has_told.wait(), 5)
    try:
        whole, routes = combined(document, options.cast.routes, found)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise SubjectError(
            f"the schema at {options.schema or _SCHEMA} is not as OpenAPI says ({type(error).__name__}: {error}); give "
            "another one by --schema"
        ) from error
    known = {route.key for route in routes}
    notes += tuple(f"public: there is no route {key!r}" for key in options.cast.public if key not in known)
    notes += tuple(f"skip: there is no route {key!r}" for key in options.skip if key not in known)
    kept = [route for route in routes if route.key not in options.skip]
    if not kept:
        raise SubjectError(
            f"there is nothing to try: no schema at {options.schema or _SCHEMA}, no routes in the application's router "
            "that could be read, and none given; give routes in the users' file, or --schema"
        )
    progress.stage(f"making requests for {len(kept)} routes", None)
    return await _made(whole, kept, options), notes


async def _made(whole: Document, routes: Sequence[Route], options: Options) -> Material:
    """In a thread, which ends soon when this is cancelled. How users sign in and out is tried as that alone: who is
    made to sign out in between is refused everywhere else.
    """
    calls = [call for user in options.cast.users for call in (user.sign_in, user.sign_out) if call is not None]
    signing = {call.key: call for call in calls}
    clock = time.monotonic
    until, is_given_up = clock() + _MAKING, threading.Event()
    others = [route for route in routes if route.key not in signing]
    try:
        material = await asyncio.to_thread(
            make_material, whole, others, options.seed, lambda: is_given_up.is_set() or clock() >= until
        )
    finally:
        is_given_up.set()
    known = {route.key for route in routes}
    unknown = [Route(key, call.method, key.split()[1], "given") for key, call in signing.items() if key not in known]
    material.routes = (*routes, *unknown)
    material.not_made.update(dict.fromkeys(signing, "users sign in or out by it, and that is tried as such"))
    return material


async def _document(port: int, options: Options) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """The application's schema, or why there is none."""
    if options.schema is not None and not options.schema.startswith("/"):
        try:
            return json.loads(_text_of(options.schema)), ()
        except (OSError, ValueError) as error:
            raise SubjectError(f"--schema {options.schema} cannot be read: {error}") from None
    path = options.schema or _SCHEMA
    line = await Line.open(port)
    first = Credentials(options.cast.users[0], [])
    answer = await line.answer(line.send(Request("GET", first.target(path), first.headers(path))))
    line.close()
    try:
        document = json.loads(answer.body) if answer.is_success else None
    except ValueError:
        document = None
    if is_object(document) and is_object(document.get("paths")):
        return document, ()
    if options.schema is not None:
        raise SubjectError(
            f"--schema {path} is answered with {answer.status or 'nothing'}, and not with an OpenAPI schema"
        )
    return None, (f"the application has no OpenAPI schema at {path} (it answers {answer.status or 'nothing'})",)


def _text_of(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")
