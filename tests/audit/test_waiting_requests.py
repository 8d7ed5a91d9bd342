"""Requests that wait for the ledger, while clients leave, tasks are cancelled and servers stop: none hangs or leaks."""

import asyncio
import gc
import logging
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from support.asgi import http_scope, status_of
from support.ledger_check import LedgerCheck
from support.waiting import wait_until
from ucm_middleware import UserContextManager, UserContextMiddleware, UserExecutionContext, current_context
from ucm_middleware.audit import SQLiteLedger, database, writer
from ucm_middleware.testing import closing_contexts
from ucm_middleware.types import Message, Receive, Scope, Send


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SQLiteLedger]:
    with closing(SQLiteLedger(tmp_path / "audit.db", keys=None)) as ledger:
        yield ledger


@pytest.fixture
def manager(ledger: SQLiteLedger) -> Iterator[UserContextManager]:
    manager = UserContextManager(ledger=ledger, audit="strict", max_contexts_per_user=1000, guard="open")
    with closing_contexts(manager):
        yield manager


@contextmanager
def locked(ledger: SQLiteLedger) -> Iterator[None]:
    """Another program has it locked: whoever waits for the ledger waits."""
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


class Exchange:
    """One request under way: its app answers when it may, and what is sent of the answer is kept."""

    def __init__(self, manager: UserContextManager, *, notices: bool = False) -> None:
        self.has_begun, self.may_answer, self.answers = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.sent: list[Message] = []
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self._context: weakref.ref[UserExecutionContext] | None = None
        middleware = UserContextMiddleware(
            self._app, manager=manager, identify=lambda connection: "alice", cancel_on_disconnect=notices
        )
        self.task = asyncio.create_task(self._run(middleware))

    @property
    def is_gone(self) -> bool:
        if self._context is not None and self._context() is not None:
            gc.collect()
        return self._context is None or self._context() is None

    async def _run(self, middleware: UserContextMiddleware) -> None:
        await middleware(http_scope(), self.messages.get, self._send)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._context = weakref.ref(current_context())
        self.has_begun.set()
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.answers.set()
        await send({"type": "http.response.body", "body": b"whole"})

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


def events(ledger: SQLiteLedger) -> list[tuple[str, str | None]]:
    """What is on record, and why, once the ledger can be written."""
    ledger.flush()
    return [(record["event"], record.get("reason")) for record in LedgerCheck(ledger.path).read()]


async def test_cancelled_before_it_begins(ledger: SQLiteLedger, manager: UserContextManager) -> None:
    with locked(ledger):
        exchange = Exchange(manager)
        await asyncio.sleep(0)
        assert len(manager.get_active_contexts()) == 1
        exchange.task.cancel()
        await asyncio.wait({exchange.task})
        assert exchange.task.cancelled()
        assert not exchange.has_begun.is_set()
        assert manager.get_active_contexts() == {}
    assert events(ledger) == [("opened", None), ("closed", "cancelled")]


async def test_cancelled_before_its_answer_is_complete(ledger: SQLiteLedger, manager: UserContextManager) -> None:
    exchange = Exchange(manager)
    await exchange.has_begun.wait()
    with locked(ledger):
        exchange.may_answer.set()
        await exchange.answers.wait()
        exchange.task.cancel()
        await asyncio.wait({exchange.task})
        assert exchange.task.cancelled()
        assert exchange.sent == []
        assert manager.get_active_contexts() == {}
    assert events(ledger) == [("opened", None), ("answered", None), ("closed", "cancelled")]
    del exchange.task  # its error holds the frames that it went through
    assert exchange.is_gone


async def test_the_client_leaves_before_the_answer_is_complete(
    ledger: SQLiteLedger, manager: UserContextManager
) -> None:
    exchange = Exchange(manager, notices=True)
    await exchange.has_begun.wait()
    with locked(ledger):
        exchange.may_answer.set()
        await exchange.answers.wait()
        exchange.messages.put_nowait({"type": "http.disconnect"})
        # Its end waits for the record of it: a server that asks whether it has ended is told the truth.
        await asyncio.wait({exchange.task}, timeout=0.1)
        assert exchange.sent == []
    await exchange.task
    assert manager.get_active_contexts() == {}
    assert exchange.is_gone
    assert events(ledger)[-1] == ("closed", "disconnected")


async def test_all_who_wait_are_told_when_it_cannot_be_written(
    ledger: SQLiteLedger, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    monkeypatch.setattr(writer, "FIRST_PAUSE", 3)
    begun = [Exchange(manager) for _ in range(50)]
    for exchange in begun:
        await exchange.has_begun.wait()
    ledger.close()  # the connection that it opens next has little patience
    with locked(ledger):
        waiting = [Exchange(manager) for _ in range(50)]
        for exchange in begun:
            exchange.may_answer.set()
        await asyncio.gather(*(exchange.task for exchange in (*begun, *waiting)))
        assert {status_of(exchange.sent) for exchange in (*begun, *waiting)} == {503}
        assert not any(exchange.has_begun.is_set() for exchange in waiting)
        assert manager.get_active_contexts() == {}
        # Also while the writer rests until it tries again.
        wait_until(lambda: all(exchange.is_gone for exchange in begun), "their contexts are gone", timeout=1)
        assert not manager.is_healthy()


async def test_a_server_that_stops_while_it_cannot_be_written(
    ledger: SQLiteLedger,
    manager: UserContextManager,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    exchange = Exchange(manager)
    await exchange.has_begun.wait()
    ledger.close()
    with locked(ledger):
        drained = asyncio.create_task(manager.drain(0.05))
        async with asyncio.timeout(30):
            assert await drained == 1
            await asyncio.wait({exchange.task})
        assert [record.message for record in caplog.records if record.levelno == logging.CRITICAL] != []
        assert manager.get_active_contexts() == {}
        assert exchange.sent == [] or status_of(exchange.sent) == 503
    wait_until(lambda: ledger.problem is None, "it can be written again")
    assert events(ledger)[-1] == ("closed", "shutdown")
