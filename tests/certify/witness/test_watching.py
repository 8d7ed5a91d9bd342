"""The witness sees what is logged and what spans say while a request is answered, and nothing later."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from ucm_middleware.certify.witness.asked import Asked, Marker
from ucm_middleware.certify.witness.loading import routes_of
from ucm_middleware.certify.witness.watching import Watch, watch_logs
from ucm_middleware.certify.witness.wire import NUMBER, Order, Told

CANARY = "qzx0123canary"
LOG = logging.getLogger("shop")


class Ear:
    """In place of the reporter."""

    def __init__(self) -> None:
        self.order = Order("app", False, (CANARY,))
        self.told: list[Told] = []

    def tell(self, told: Told) -> None:
        self.told.append(told)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> tuple[Ear, ContextVar[Asked | None]]:
    monkeypatch.setattr(logging.Logger, "handle", logging.Logger.handle)
    # No handler gets a record, pytest's included: what it captures must be UTF-8.
    monkeypatch.setattr(LOG, "filters", [lambda _: False])
    ear, variable = Ear(), ContextVar[Asked | None]("asked", default=None)
    watch_logs(Watch(ear, variable).look_at_log)  # type: ignore[arg-type]
    return ear, variable


async def ask(app: Callable[..., Awaitable[None]], variable: ContextVar[Asked | None], number: int = 7) -> None:
    scope: dict[str, Any] = {"type": "http", "headers": [(NUMBER.encode(), str(number).encode())]}
    await Marker(app, variable, lambda: None)(scope, None, None)  # type: ignore[arg-type]


class Weird:
    def __str__(self) -> str:
        raise RuntimeError("not to be shown")


def plain() -> None:
    LOG.warning("before: %s", CANARY)


def as_an_extra() -> None:
    LOG.warning("hello", extra={"customer": {"name": CANARY}})


def beside_what_cannot_be_shown() -> None:
    LOG.warning("hello", extra={"weird": Weird(), "customer": CANARY})


def in_a_traceback() -> None:
    try:
        raise ValueError(CANARY.upper())
    except ValueError:
        LOG.exception("it failed")


def with_the_factory_replaced() -> None:
    make = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    try:
        plain()
    finally:
        logging.setLogRecordFactory(make)


def with_broken_characters() -> None:
    LOG.warning("\ud800 %s", CANARY)


@pytest.mark.parametrize(
    "log",
    [
        plain,
        as_an_extra,
        beside_what_cannot_be_shown,
        in_a_traceback,
        with_the_factory_replaced,
        with_broken_characters,
    ],
)
async def test_a_canary_in_a_record_is_told_with_its_request(
    log: Callable[[], None], ear: tuple[Ear, ContextVar[Asked | None]]
) -> None:
    async def app(*_: object) -> None:
        log()

    await ask(app, ear[1])
    assert [(told.kind, told.number, told.where) for told in ear[0].told] == [("log", 7, "shop")]
    assert CANARY in Told.of_json(json.loads(json.dumps(ear[0].told[0].to_json()))).text.lower()


async def test_nothing_is_told_of_what_holds_no_canary_or_belongs_to_no_request(
    ear: tuple[Ear, ContextVar[Asked | None]],
) -> None:
    is_over = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        await is_over.wait()
        plain()

    async def app(*_: object) -> None:
        LOG.warning("nothing in it")
        tasks.append(asyncio.create_task(later()))

    plain()
    await ask(app, ear[1])
    is_over.set()
    await asyncio.gather(*tasks)
    plain()
    assert ear[0].told == []


async def test_each_of_two_requests_at_once_has_its_own(ear: tuple[Ear, ContextVar[Asked | None]]) -> None:
    both = asyncio.Barrier(2)

    async def app(*_: object) -> None:
        await both.wait()
        await asyncio.to_thread(plain)

    await asyncio.gather(*(asyncio.create_task(ask(app, ear[1], number)) for number in (1, 2)))
    assert sorted(told.number or 0 for told in ear[0].told) == [1, 2]


SPANS = """
from ucm_middleware.certify.witness.spans import provide, watch_spans
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
seen, numbers = [], iter(range(100))
early = trace.get_tracer("early")
if {before}:
    trace.set_tracer_provider(TracerProvider())
assert watch_spans(lambda: next(numbers), lambda number, span: seen.append((number, span.name))) is None
if {late}:
    trace.set_tracer_provider(TracerProvider())  # in its lifespan, say
provide()
with early.start_as_current_span("outer"), trace.get_tracer("x").start_as_current_span("inner"):
    pass
with TracerProvider().get_tracer("own").start_as_current_span("own"):
    pass
assert seen == [(1, "inner"), (0, "outer"), (2, "own")], seen
"""


@pytest.mark.parametrize(("before", "late"), [(True, False), (False, True), (False, False)])
def test_spans_are_seen_whenever_the_provider_is_made(before: bool, late: bool) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", SPANS.format(before=before, late=late)], check=True)


def test_routes_are_found_behind_middlewares_and_what_is_no_router_has_none() -> None:
    class Endpoint:
        path, methods, endpoint = "/x", {"GET"}, None

    class App:
        def __init__(self) -> None:
            self.routes = [Endpoint()]

    class Around:
        def __init__(self, app: object) -> None:
            self.app = app

    class Odd:
        def routes(self) -> None:
            """Not a list."""

    assert [*routes_of(Around(Around(App())))] == [("/x", ("GET",), False)]
    assert [*routes_of(Around(Odd()))] == []
    around = Around(None)
    around.app = around
    assert [*routes_of(around)] == []
