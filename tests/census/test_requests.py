"""What the census does at the end of a request, in process: how it counts, and what of it stands in a user's trail."""

import contextvars
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from support.asgi import exchange, http_scope
from support.waiting import wait_until
from ucm_middleware import (
    CensusPolicy,
    ContextLeakError,
    UserContextManager,
    UserContextMiddleware,
    current_context,
    managed_user_context,
)
from ucm_middleware.audit import SQLiteLedger
from ucm_middleware.audit.records import Row
from ucm_middleware.census.census import Census, search
from ucm_middleware.census.survey import survey
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import ASGIApp, Receive, Scope, Send

pytestmark = pytest.mark.ucm_leaks("what is left running is what these tests are about")


@pytest.fixture
def suspects(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The paths of the requests whose contexts were suspected."""
    noted: list[object] = []
    monkeypatch.setattr(Census, "suspect", lambda census, context, expected: noted.append(context.user_id))
    return noted


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def serve(app: ASGIApp, manager: UserContextManager) -> UserContextMiddleware:
    return UserContextMiddleware(app, manager=manager, identify=lambda connection: "alice")


async def test_a_request_is_not_suspected_for_its_recorded_answer(tmp_path: Path, suspects: list[object]) -> None:
    with closing(SQLiteLedger(tmp_path / "audit.db", keys=None)) as ledger:
        await exchange(serve(answer, UserContextManager(audit="strict", ledger=ledger)), http_scope())
    assert suspects == []


@pytest.mark.parametrize("state", [None, "text", {}])
async def test_the_app_may_put_anything_in_the_place_of_the_state(state: Any, suspects: list[object]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = state
        await answer(scope, receive, send)

    await exchange(serve(app, UserContextManager()), http_scope())
    assert suspects == []


async def test_what_cannot_be_recorded_is_raised_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Full(RecordingLedger):
        def append(self, row: Row) -> None:
            if row[0] == "outlived":
                raise OSError("full")
            super().append(row)

    gate = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(gate.wait,), daemon=True).start()
        await answer(scope, receive, send)

    manager = UserContextManager(ledger=Full(), census=CensusPolicy(action="raise"))
    try:
        with pytest.raises(ContextLeakError, match="thread"):
            await exchange(serve(app, manager), http_scope())
    finally:
        gate.set()
    assert "could not be told" in caplog.text


def test_a_survey_does_not_keep_what_a_thread_worked_on() -> None:
    """A frame keeps what it shows of its variables, and a pool's thread goes on with other jobs."""
    manager = UserContextManager(census=CensusPolicy(action="off"))
    running, gate = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        gate.wait()

    with ThreadPoolExecutor(1) as pool:
        context = manager.create_isolated_context("alice")
        with managed_user_context(context):
            future = pool.submit(contextvars.copy_context().run, job)
        running.wait()
        assert [holder.kind for holder in survey([context])[context]] == ["thread"]
        gate.set()
        future.result()
        gone = weakref.ref(context)
        del context, future
        wait_until(lambda: gone() is None, "the context is gone")


def test_a_thread_that_is_through_with_a_job_is_not_named() -> None:
    """It lets go of the job's Context a moment after who waits for the result is told."""
    manager = UserContextManager(census=CensusPolicy(action="off"))
    running, go_on, told, gate = (threading.Event() for _ in range(4))

    def job() -> None:
        running.set()
        go_on.wait()

    def tell(_: object) -> None:
        told.set()
        gate.wait()

    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        stack.callback(gate.set)
        stack.callback(go_on.set)
        context = manager.create_isolated_context("alice")
        with managed_user_context(context):
            future = pool.submit(contextvars.copy_context().run, job)
        future.add_done_callback(tell)
        running.wait()
        assert [holder.kind for holder in survey([context])[context]] == ["thread"]
        go_on.set()
        told.wait()
        assert survey([context]) == {}


@pytest.fixture
def shop() -> Iterator[Any]:
    module: Any = types.ModuleType("shop")
    module.SESSIONS = {}
    sys.modules["shop"] = module
    yield module
    del sys.modules["shop"]


def test_keys_on_the_way_to_a_context_are_not_named(shop: Any) -> None:
    """They may be ids of other users, and the path stands in this user's trail."""
    context = UserContextManager().create_isolated_context("alice")
    shop.SESSIONS["bob"] = {"of": [context]}
    context.close()
    found = search({context: True}, 10)
    assert str(found[context]) == "reference shop.SESSIONS[<str>][<str>][0]"


async def test_current_context_is_not_kept_by_the_census() -> None:
    kept: list[weakref.ref[Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(weakref.ref(current_context()))
        await answer(scope, receive, send)

    await exchange(serve(app, UserContextManager()), http_scope())
    assert kept[0]() is None


def test_without_an_event_loop_looks_take_a_share_of_the_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def counted(contexts: Any) -> Any:
        looks.append(len(contexts))
        return survey(contexts)

    monkeypatch.setattr("ucm_middleware.census.census.survey", counted)
    monkeypatch.setattr("ucm_middleware.census.census.SHARE", 1e9)
    manager = UserContextManager()
    copies = []
    for _ in range(5):
        with managed_user_context(manager.create_isolated_context("alice")):
            copies.append(contextvars.copy_context())
    assert looks == [1]
