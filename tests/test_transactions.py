"""Transactions through a manager: the port that adapters of databases fill, on a real database."""

import asyncio
import hmac
import logging
import sqlite3
from base64 import b32encode
from pathlib import Path
from typing import Any

import pytest

from support.contexts import MakeManager, running_as
from support.database import SQLiteNotes
from support.tracing import Sdk, about, installed
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    InvalidContextError,
    LedgerUnavailableError,
    PluginError,
    TransactionLog,
    UserContextManager,
    create_isolated_execution_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.audit import Row
from ucm_middleware.testing import FakeClock, RecordingLedger

NEW = "insert into notes (person, body) values (:person, :body)"
HIS = {"person": "alice", "body": "milk"}
ORPHAN = {"person": "nobody", "body": "milk"}  # refused at the commit, not before


@pytest.fixture
def notes(tmp_path: Path) -> SQLiteNotes:
    return SQLiteNotes(tmp_path / "notes.db")


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(make_manager: MakeManager, notes: SQLiteNotes, ledger: RecordingLedger) -> UserContextManager:
    return make_manager(plugins=[notes], ledger=ledger)


def phases(ledger: RecordingLedger, user: str = "alice") -> list[tuple[object, object]]:
    told = [dict(record.data) for record in ledger.select("transaction", user=user)]
    return [(data["phase"], data.get("statements")) for data in told]


class TestAContextWithATransaction:
    async def test_is_committed_when_it_ends_well(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        context = manager.create_context_with_transaction("alice", isolation_level="SERIALIZABLE")
        async with managed_user_context(context):
            await context.db_session.execute(NEW, HIS)
            await context.db_session.execute(NEW, {**HIS, "body": "bread"})
            assert notes.bodies() == []
        assert notes.bodies() == ["milk", "bread"]
        assert phases(ledger) == [("begin", None), ("commit", 2)]
        assert "milk" not in repr(ledger.records)
        assert notes.opened[0].level == "SERIALIZABLE"

    async def test_is_rolled_back_after_an_error(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        context = manager.create_context_with_transaction("alice")
        with pytest.raises(ZeroDivisionError):
            async with managed_user_context(context):
                await context.db_session.execute(NEW, HIS)
                raise ZeroDivisionError
        assert notes.bodies() == []
        assert phases(ledger) == [("begin", None), ("rollback", 1)]
        [_, rollback] = ledger.select("transaction", user="alice")
        assert (rollback.outcome, rollback.reason, dict(rollback.data)["error"]) == (
            "failed",
            "failed",
            "ZeroDivisionError",
        )
        assert rollback.seconds is not None

    async def test_says_when_the_commit_fails(self, manager: UserContextManager, notes: SQLiteNotes) -> None:
        context = manager.create_context_with_transaction("alice")
        with pytest.raises(ExceptionGroup) as failed:
            async with managed_user_context(context):
                await context.db_session.execute(NEW, ORPHAN)
        assert isinstance(failed.value.exceptions[0], sqlite3.IntegrityError)
        assert notes.bodies() == []

    @pytest.mark.parametrize("how", ["expired", "revoked", "shutdown"])
    async def test_is_rolled_back_when_it_is_cut_off(
        self, make_manager: MakeManager, notes: SQLiteNotes, ledger: RecordingLedger, how: str
    ) -> None:
        clock = FakeClock()
        manager = make_manager(plugins=[notes], ledger=ledger, clock=clock)
        context = manager.create_context_with_transaction("alice", ttl_seconds=60)
        await context.db_session.execute(NEW, HIS)
        if how == "expired":
            clock.advance(61)
            manager.sweep()
        elif how == "revoked":
            manager.revoke("alice", "stolen")
        else:
            await manager.drain(0)
        await context.lifetime.wait_closed()
        assert notes.bodies() == []
        assert phases(ledger) == [("begin", None), ("rollback", 1)]
        [_, rollback] = ledger.select("transaction", user="alice")
        assert rollback.reason == how

    async def test_is_committed_when_it_is_cleared(self, manager: UserContextManager, notes: SQLiteNotes) -> None:
        context = manager.create_context_with_transaction("alice")
        await context.db_session.execute(NEW, HIS)
        assert await manager.cleanup_context(("alice", context.request_id))
        assert notes.bodies() == ["milk"]

    async def test_asks_the_database_for_nothing_until_it_is_used(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        async with managed_user_context(manager.create_context_with_transaction("alice")):
            assert not notes.opened[0].is_connected
        assert phases(ledger) == []

    async def test_gives_its_session_to_nobody_else(self, manager: UserContextManager, notes: SQLiteNotes) -> None:
        context = manager.create_context_with_transaction("alice")
        session = context.db_session
        await session.execute(NEW, HIS)
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await session.execute(NEW, {**HIS, "body": "bread"})
        await context.aclose()
        with pytest.raises(ContextClosedError):
            await session.execute(NEW, HIS)
        assert notes.bodies() == ["milk"]

    def test_is_not_opened_for_another_user(self, manager: UserContextManager, notes: SQLiteNotes) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            manager.create_context_with_transaction("alice")
        assert notes.opened == []


class TestOneStatement:
    async def test_is_committed_and_gives_its_rows(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        written = await manager.execute_in_transaction("alice", NEW, HIS)
        assert (written.rows, written.rowcount) == ((), 1)
        read = await manager.execute_in_transaction("alice", "select id, body from notes")
        assert read.rows == ({"id": 1, "body": "milk"},)
        assert phases(ledger) == [("begin", None), ("commit", 1)] * 2
        assert not manager.get_active_contexts()

    async def test_says_itself_why_it_was_not_committed(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            await manager.execute_in_transaction("alice", NEW, ORPHAN)
        with pytest.raises(sqlite3.OperationalError):
            await manager.execute_in_transaction("alice", "insert into nowhere values (1)")
        assert notes.bodies() == []
        assert [phase for phase, _ in phases(ledger)] == ["begin", "rollback"] * 2

    async def test_runs_in_a_child_of_the_users_own_context(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        with running_as(manager, "alice") as context:
            await manager.execute_in_transaction("alice", NEW, HIS)
        begin, commit = ledger.select("transaction", user="alice")
        assert begin.context_id == commit.context_id != context.context_id
        assert begin.thread_id == context.thread_id

    async def test_of_another_user_is_refused_before_anything_is_opened(
        self, manager: UserContextManager, notes: SQLiteNotes, ledger: RecordingLedger
    ) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await manager.execute_in_transaction("alice", NEW, HIS)
        assert notes.opened == []
        assert [record.user_id for record in ledger.select("denied")] == ["bob"]

    async def test_of_another_user_runs_in_a_privileged_block(
        self, manager: UserContextManager, ledger: RecordingLedger, notes: SQLiteNotes
    ) -> None:
        with running_as(manager, "bob"), manager.privileged(reason="support", users=["alice"]):
            await manager.execute_in_transaction("alice", NEW, HIS)
        assert notes.bodies() == ["milk"]
        assert phases(ledger) == [("begin", None), ("commit", 1)]

    async def test_is_rolled_back_when_it_is_cancelled(
        self, make_manager: MakeManager, tmp_path: Path, ledger: RecordingLedger
    ) -> None:
        reached = asyncio.Event()

        class Slow(SQLiteNotes):
            @hookimpl
            def ucm_open_transaction(self, context: Any, isolation_level: Any) -> Any:
                opened = super().ucm_open_transaction(context, isolation_level)
                run = opened.execute

                async def execute(statement: object, parameters: object = None) -> Any:
                    await run(statement, parameters)
                    reached.set()
                    await asyncio.Event().wait()

                opened.execute = execute  # type: ignore[method-assign]
                return opened

        notes = Slow(tmp_path / "slow.db")
        manager = make_manager(plugins=[notes], ledger=ledger)
        running = asyncio.create_task(manager.execute_in_transaction("alice", NEW, HIS))
        await reached.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert notes.bodies() == []
        [_, rollback] = ledger.select("transaction", user="alice")
        assert rollback.reason == "cancelled"

    @pytest.mark.parametrize("user_id", ["", "a\0b", "x" * 10_000, "null"])
    async def test_for_a_bad_id_is_refused(self, manager: UserContextManager, notes: SQLiteNotes, user_id: str) -> None:
        with pytest.raises(InvalidContextError, match="user_id"):
            await manager.execute_in_transaction(user_id, NEW, HIS)
        with pytest.raises(InvalidContextError, match="user_id"):
            manager.create_context_with_transaction(user_id)
        assert notes.opened == []


class TestWithoutAnAdapter:
    async def test_it_is_said_what_is_missing(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        with pytest.raises(ConfigurationError, match="no plugin of this manager opens transactions"):
            manager.create_context_with_transaction("alice")
        with pytest.raises(ConfigurationError, match="no plugin of this manager opens transactions"):
            await manager.execute_in_transaction("alice", "select 1")
        assert not manager.get_active_contexts()

    @pytest.mark.parametrize(("answer", "error"), [(None, ConfigurationError), ("a session", PluginError)])
    async def test_an_answer_that_is_no_transaction_is_refused(
        self, make_manager: MakeManager, answer: object, error: type[Exception]
    ) -> None:
        class Plugin:
            @hookimpl
            def ucm_open_transaction(self) -> object:
                return answer

        manager = make_manager(plugins=[Plugin()])
        with pytest.raises(error, match="None"):
            manager.create_context_with_transaction("alice")
        with pytest.raises(error, match="None"):
            await manager.execute_in_transaction("alice", "select 1")
        assert not manager.get_active_contexts()

    async def test_another_word_for_the_isolation_is_refused(self, manager: UserContextManager) -> None:
        level: Any = "SNAPSHOT"
        with pytest.raises(ConfigurationError, match="isolation_level is 'SNAPSHOT'; give one of READ COMMITTED"):
            manager.create_context_with_transaction("alice", isolation_level=level)
        with pytest.raises(ConfigurationError, match="READ COMMITTED"):
            await manager.execute_in_transaction("alice", NEW, HIS, isolation_level=level)


class TestTheRecords:
    async def test_what_cannot_be_recorded_does_not_begin(self, make_manager: MakeManager, notes: SQLiteNotes) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "transaction":
                    raise LedgerUnavailableError("disk full")
                super().append(row)

        manager = make_manager(plugins=[notes], ledger=Full())
        with pytest.raises(LedgerUnavailableError):
            await manager.execute_in_transaction("alice", NEW, HIS)
        assert not notes.opened[0].is_connected

    async def test_a_commit_that_cannot_be_recorded_stays_one(
        self, make_manager: MakeManager, notes: SQLiteNotes, caplog: pytest.LogCaptureFixture
    ) -> None:
        class FullAfterTheBegin(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "transaction" and self.select("transaction"):
                    raise LedgerUnavailableError("disk full")
                super().append(row)

        manager = make_manager(plugins=[notes], ledger=FullAfterTheBegin())
        with caplog.at_level(logging.ERROR):
            await manager.execute_in_transaction("alice", NEW, HIS)
        assert notes.bodies() == ["milk"]
        assert "the commit of a transaction on notes could not be recorded" in caplog.text

    def test_under_no_manager_there_are_none(self) -> None:
        context = create_isolated_execution_context("alice")
        log = TransactionLog(context, "notes")
        log.begin()
        log.commit()
        context.close()
        with pytest.raises(ContextClosedError):
            TransactionLog(context, "notes").begin()

    async def test_spans_carry_them(self, make_manager: MakeManager, notes: SQLiteNotes) -> None:
        with installed(Sdk()) as sdk:
            manager = make_manager(plugins=[notes])
            await manager.execute_in_transaction("alice", NEW, HIS)
            begin, commit = map(about, sdk.named("ucm transaction"))
            with running_as(manager, "bob") as context:
                context.record("transaction", data={"phase": "bob's secret", "database": "bob's secret"})
            odd = about(sdk.named("ucm transaction")[2])
        assert (begin["ucm.transaction.phase"], begin["ucm.transaction.database"]) == ("begin", "notes")
        assert (commit["ucm.transaction.phase"], commit["ucm.transaction.statements"]) == ("commit", 1)
        assert not {"milk", "alice"} & {*map(str, begin.values()), *map(str, commit.values())}
        assert "secret" not in repr(odd)

    def test_a_transaction_ends_once(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        context = manager.create_isolated_context("alice")
        log = TransactionLog(context, "notes", role="reader")
        log.commit()  # it has not begun
        log.begin()
        log.commit()
        log.rollback(ZeroDivisionError())
        assert phases(ledger) == [("begin", None), ("commit", 0)]
        assert {dict(record.data)["role"] for record in ledger.select("transaction")} == {"reader"}


class TestKeysForAdapters:
    FIRST, SECOND = "first-6Yb0qk3Zt8Wm2Xc9Vn5Ls7Rj1Kd", "second-9Qw4Er7Ty2Ui5Op8As1Df3Gh6"

    def test_each_purpose_has_its_own(self, make_manager: MakeManager) -> None:
        manager = make_manager(secret=self.FIRST)
        [one] = manager.subkeys("postgres binding")
        assert len(one) == 32
        assert manager.subkeys("something else") != (one,)
        assert make_manager(secret=self.FIRST).subkeys("postgres binding") == (one,)
        assert make_manager(secret=self.SECOND).subkeys("postgres binding") != (one,)

    def test_those_of_earlier_secrets_follow(self, make_manager: MakeManager) -> None:
        before = make_manager(secret=self.FIRST).subkeys("postgres binding")
        after = make_manager(secret=self.SECOND, previous_secrets=[self.FIRST]).subkeys("postgres binding")
        assert len(after) == 2
        assert after[1:] == before

    def test_none_is_what_the_core_itself_goes_by(self, make_manager: MakeManager) -> None:
        manager = make_manager(secret=self.FIRST)
        context = manager.create_isolated_context("alice")
        key = context.derive_key("thread", "1")
        [subkey] = manager.subkeys("owner-derived keys")
        message = b"".join(len(text).to_bytes(4, "big") + text for text in (b"alice", b"thread", b"1"))
        forged = b32encode(hmac.digest(subkey, message, "sha256")[:25]).decode().lower()
        assert not key.endswith(forged)

    def test_in_production_there_must_be_a_secret(
        self, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UCM_ENVIRONMENT", "production")
        manager = make_manager()
        with pytest.raises(ConfigurationError, match="UCM_SECRET is not set, and postgres binding must have it"):
            manager.subkeys("postgres binding")

    @pytest.mark.parametrize("purpose", ["", " ", "a\nb"])
    def test_a_purpose_is_words(self, make_manager: MakeManager, purpose: str) -> None:
        with pytest.raises(ConfigurationError, match="purpose"):
            make_manager().subkeys(purpose)
