"""The census of `managed_user_context`, and of threads without an event loop."""

import asyncio
import contextvars
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from support.contexts import MakeManager
from support.waiting import wait_until
from ucm_middleware import (
    CensusPolicy,
    ConfigurationError,
    ContextLeakError,
    UserContextManager,
    managed_user_context,
)

pytestmark = pytest.mark.ucm_leaks("what is left running is what these tests are about")


def outlived(manager: UserContextManager, user: str = "alice") -> list[dict[str, Any]]:
    with manager.privileged(reason="the test asks", users=[user]):
        trail = manager.get_audit_trail(user)
    return [] if trail is None else [event for event in trail["events"] if event["event"] == "outlived"]


@pytest.fixture
def manager(make_manager: MakeManager) -> UserContextManager:
    return make_manager(census=CensusPolicy(action="record"))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def start(gate: threading.Event) -> threading.Thread:
    """A thread in the Context of whoever calls, which waits at the gate."""
    running = threading.Event()

    def run() -> None:
        running.set()
        gate.wait()

    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="late", daemon=True)
    worker.start()
    running.wait()
    return worker


async def looked() -> None:
    """Until what was suspected now has been looked at."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def test_a_thread_is_named_without_an_event_loop(manager: UserContextManager, gate: threading.Event) -> None:
    with managed_user_context(manager.create_isolated_context("alice")):
        worker = start(gate)
    gate.set()
    worker.join()
    (event,) = outlived(manager)
    assert event["kinds"] == ["thread"]
    assert re.match(r"thread 'late' in [\w.]*test_blocks\.start\.<locals>\.run, at .*test_blocks", event["holders"][0])


def test_a_block_that_is_clean_leaves_nothing(manager: UserContextManager, gate: threading.Event) -> None:
    with managed_user_context(manager.create_isolated_context("alice")) as context:
        worker = start(gate)
        gate.set()
        worker.join()
        context.agent_context["seen"] = True
        del context
    assert outlived(manager) == []


def test_the_blocks_own_name_for_its_context_is_no_leak(manager: UserContextManager) -> None:
    mine = manager.create_isolated_context("alice")
    with managed_user_context(mine) as context:
        assert context is mine
    assert outlived(manager) == []


async def test_a_task_of_a_block_is_named(manager: UserContextManager) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        task = asyncio.create_task(asyncio.sleep(3600))
    await looked()
    (event,) = outlived(manager)
    assert event["kinds"] == ["task"]
    task.cancel()


async def test_a_block_of_an_ordinary_with_in_a_loop(manager: UserContextManager) -> None:
    with managed_user_context(manager.create_isolated_context("alice")):
        task = asyncio.create_task(asyncio.sleep(3600))
    await looked()
    assert [event["kinds"] for event in outlived(manager)] == [["task"]]
    task.cancel()


async def test_a_task_that_ends_in_the_turn_after_is_none(manager: UserContextManager) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        task = asyncio.create_task(asyncio.sleep(0))
        await task
    await looked()
    assert outlived(manager) == []


async def test_raise_in_a_block_has_all_that_is_to_know(make_manager: MakeManager) -> None:
    manager = make_manager(census=CensusPolicy(action="raise"))
    context = manager.create_isolated_context("alice")
    tasks = []
    with pytest.raises(ContextLeakError, match=r"asyncio\.tasks\.sleep") as raised:
        async with managed_user_context(context):
            tasks.append(asyncio.create_task(asyncio.sleep(3600)))
            await asyncio.sleep(0)
    assert raised.value.request_id == context.request_id
    assert "test_blocks.py" in raised.value.opened_at
    assert [holder.partition(",")[0] for holder in raised.value.holders] == ["task asyncio.tasks.sleep"]
    await looked()
    assert len(outlived(manager)) == 1
    tasks[0].cancel()


def test_raise_without_a_loop(make_manager: MakeManager, gate: threading.Event) -> None:
    manager = make_manager(census=CensusPolicy(action="raise"))
    with (
        pytest.raises(ContextLeakError, match="thread 'late'"),
        managed_user_context(manager.create_isolated_context("alice")),
    ):
        start(gate)
    assert len(outlived(manager)) == 1


def test_an_error_of_the_block_goes_first(make_manager: MakeManager, gate: threading.Event) -> None:
    manager = make_manager(census=CensusPolicy(action="raise"))
    with pytest.raises(ValueError, match="mine"), managed_user_context(manager.create_isolated_context("alice")):
        start(gate)
        raise ValueError("mine")
    assert len(outlived(manager)) == 1


async def test_cancel_ends_the_task_of_a_block(make_manager: MakeManager) -> None:
    manager = make_manager(census=CensusPolicy(action="cancel"))
    async with managed_user_context(manager.create_isolated_context("alice")):
        task = asyncio.create_task(asyncio.sleep(3600))
    async with asyncio.timeout(15):
        with pytest.raises(asyncio.CancelledError):
            await task
    await looked()
    assert len(outlived(manager)) == 1


@pytest.mark.parametrize("action", ["record", "warn", "cancel"])
async def test_it_is_in_the_log_and_no_user_is(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, action: Any
) -> None:
    manager = make_manager(census=CensusPolicy(action=action))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        async with managed_user_context(manager.create_isolated_context("alice")):
            task = asyncio.create_task(asyncio.sleep(3600))
        await looked()
    task.cancel()
    [line] = [line for line in caplog.records if line.levelno == logging.WARNING]
    assert "is closed and still held by task asyncio.tasks.sleep" in line.getMessage()
    assert "alice" not in line.getMessage()


async def test_warn_is_what_one_gets_outside_of_production(make_manager: MakeManager) -> None:
    manager = make_manager()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with managed_user_context(manager.create_isolated_context("alice")):
            task = asyncio.create_task(asyncio.sleep(3600))
        await looked()
    task.cancel()
    (warning,) = [one for one in caught if issubclass(one.category, ResourceWarning)]
    assert "is closed and still held by task asyncio.tasks.sleep" in str(warning.message)
    assert "alice" not in str(warning.message)


async def test_a_warning_that_is_an_error_is_logged_and_the_others_are_told(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(census=CensusPolicy(action="warn"))
    tasks = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for user in ("alice", "bob"):
            async with managed_user_context(manager.create_isolated_context(user)):
                tasks.append(asyncio.create_task(asyncio.sleep(3600)))
        await looked()
    for task in tasks:
        task.cancel()
    assert [len(outlived(manager, user)) for user in ("alice", "bob")] == [1, 1]
    assert "still held by" in caplog.text


async def test_looks_are_a_twentieth_of_the_time_and_none_is_forgotten(manager: UserContextManager) -> None:
    tasks = []
    for number in range(5):
        async with managed_user_context(manager.create_isolated_context(f"user{number}")):
            tasks.append(asyncio.create_task(asyncio.sleep(3600)))
        await asyncio.sleep(0)

    def all_told() -> bool:
        return all(outlived(manager, f"user{number}") for number in range(5))

    await asyncio.to_thread(wait_until, all_told, "all five are on record")
    assert [len(outlived(manager, f"user{number}")) for number in range(5)] == [1] * 5
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "shout"}, "action must be one of off, record, warn, cancel, raise, not 'shout'"),
        ({"allow": "shop.mail.send"}, "allow must be a list of names"),
        ({"allow": [len]}, "allow must be a list of names"),
    ],
)
def test_a_wrong_policy_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CensusPolicy(**settings)


def test_a_loop_that_ends_before_the_look_takes_no_later_look_along(manager: UserContextManager) -> None:
    async def leave_a_task(number: int) -> None:
        async with managed_user_context(manager.create_isolated_context(f"user{number}")):
            tasks.append(asyncio.create_task(asyncio.sleep(3600)))

    async def leave_and_wait() -> None:
        await leave_a_task(3)
        await asyncio.to_thread(wait_until, lambda: bool(outlived(manager, "user3")), "it is on record")

    tasks: list[asyncio.Task[None]] = []
    for number in range(3):  # after the first look, the next is too early in these loops
        asyncio.run(leave_a_task(number))
    asyncio.run(leave_and_wait())
