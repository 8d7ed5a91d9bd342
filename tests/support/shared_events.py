"""What holds for managers that share their users, whatever the store is: what is sent, revoked and cleared in one
reaches the others.

A module that takes these classes has a fixture ``make_shared``, which makes managers on one store.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from support.events import Client, connect
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    EgressPolicy,
    UserContextManager,
    managed_user_context,
)
from ucm_middleware.cluster.store import UserKey
from ucm_middleware.hooks import hookimpl

MakeShared = Callable[..., UserContextManager]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Let the loop go on until it is so."""
    await asyncio.to_thread(wait_until, condition, what)


async def until_heard(*managers: UserContextManager, user_id: str = "alice") -> None:
    """Until these workers hear what is said to a user."""
    for manager in managers:
        assert manager.cluster is not None
        await until(partial(_hears, manager, manager.cluster.key_of(user_id)), "the worker hears what is said")


def _hears(manager: UserContextManager, key: UserKey) -> bool:
    assert manager._links is not None
    audience = manager._links.relay._audiences.get(key)
    return audience is not None and all(one.is_settled for one in audience.cursors.values())


async def until_data(client: Client, data: list[object]) -> None:
    await until(lambda: client.data == data, f"{data} came; there is {client.data}")


def revocations(manager: UserContextManager, user_id: str = "alice") -> list[dict[str, object]]:
    """The records of revocations that are of no context."""
    trail = manager.get_audit_trail(user_id)
    assert trail is not None
    return [one for one in trail["events"] if one["event"] == "revoked" and one.get("context_id") is None]


class Revoked:
    """A plugin that notes who was signed out."""

    def __init__(self) -> None:
        self.users: list[tuple[str, str]] = []

    @hookimpl
    def ucm_user_revoked(self, user_id: str, reason: str) -> None:
        self.users.append((user_id, reason))


class TestEvents:
    async def test_an_event_reaches_another_worker(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        _, client, _ = connect(second, "alice")
        await until_heard(second)
        delivery = await first.send_event("alice", "message", {"n": 1})
        first.post_event("alice", "message", {"n": 2})
        await first.notify_context_change("alice", {"plan": "gold"})

        assert (delivery.sequence, delivery.delivered, delivery.queued, delivery.kept) == (1, 0, 1, True)
        await until_data(client, [{"n": 1}, {"n": 2}, {"plan": "gold"}])
        trail = first.get_audit_trail("alice")
        assert trail is not None
        sent = [one for one in trail["events"] if one["event"] == "event_sent"]
        assert [(one["type"], one.get("sequence"), one.get("connections")) for one in sent] == [
            ("message", 1, 1),
            ("message", None, None),
            ("context_changed", 3, 1),
        ]

    async def test_what_a_run_tells_reaches_another_worker(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        first.register_agent("helper", lambda context: lambda **_: _answer())
        _, client, _ = connect(second, "alice")
        await until_heard(second)
        await first.execute_with_agent("alice", "helper")

        await until(lambda: len(client.frames) == 2, "both ends of the run came")
        assert [one["type"] for one in client.envelopes] == ["agent_started", "agent_completed"]

    async def test_a_value_that_is_protected_where_it_arrives_is_held_back_there(self, make_shared: MakeShared) -> None:
        secret = "s3cr3t-Token-9f8e7d6c5b4a39281706"
        policy = EgressPolicy(block=True)
        first, second = (make_shared(egress=policy, max_contexts_per_user=9) for _ in range(2))
        bob = second.create_isolated_context("bob")
        assert second.egress is not None
        second.egress.protect(bob, secret)
        _, here, _ = connect(first, "alice")
        _, there, _ = connect(second, "alice")
        await until_heard(first, second)
        await first.send_event("alice", "message", {"token": secret})
        await first.send_event("alice", "message", "after")

        await until_data(here, [{"token": secret}, "after"])
        await until_data(there, ["after"])
        assert [one["outcome"] for one in second.get_system_trail() if one["event"] == "egress"] == ["denied"]


class TestRevocation:
    async def test_it_reaches_every_worker(self, make_shared: MakeShared) -> None:
        told = [Revoked(), Revoked(), Revoked()]
        first, second, third = (make_shared(plugins=[one]) for one in told)
        here = first.create_isolated_context("alice")
        there, client, _ = connect(second, "alice")
        bystander = third.create_isolated_context("bob")
        number = first.revoke("alice", "stolen")

        assert number == 2
        assert here.lifetime.reason == "revoked"
        await until(lambda: there.lifetime.reason == "revoked", "the other worker's context is closed")
        await until(lambda: told[1].users == [("alice", "stolen")], "its plugins are told")
        assert told[0].users == [("alice", "stolen")]
        assert (told[2].users, bystander.is_open, client.frames) == ([], True, [])
        [mine] = revocations(first)
        [theirs] = revocations(second)
        assert (mine["contexts"], mine["reason"], "notice" in mine) == (2, "stolen", False)
        assert (theirs["contexts"], theirs["reason"], "notice" in theirs) == (1, "stolen", True)

    async def test_the_events_that_were_kept_are_forgotten_everywhere(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        context = first.create_isolated_context("alice")
        said = await first.send_event("alice", "message", 1)
        first.revoke("alice", "stolen")
        assert not context.is_open
        _, client, _ = connect(second, "alice", (said.epoch, 0))
        await until(lambda: len(client.frames) == 1, "it is told")

        assert client.envelopes[0]["type"] == "events_missed"

    async def test_the_handler_that_revokes_its_own_user_goes_on(self, make_shared: MakeShared) -> None:
        manager = make_shared()
        assert manager.cluster is not None
        context = manager.create_isolated_context("alice")
        loop, came_back, before = asyncio.get_running_loop(), asyncio.Event(), manager.cluster.on_noticed

        async def heard(*about: Any) -> None:
            await before(*about)
            loop.call_soon_threadsafe(came_back.set)

        manager.cluster.on_noticed = heard
        went_on = False
        async with managed_user_context(context):
            manager.revoke("alice", "signs out")
            async with asyncio.timeout(PATIENCE):
                await came_back.wait()  # its own notice
            went_on = True

        assert went_on
        assert context.lifetime.reason == "revoked"


class TestClear:
    async def test_a_pair_is_cleared_on_the_worker_that_has_it(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        one = second.create_isolated_context("alice", "request-1")
        other = second.create_isolated_context("alice", "request-2")
        assert first.clear_context(("alice", "request-1")) is True

        await until(lambda: one.lifetime.reason == "cleared", "it is cleared")
        assert other.is_open

    async def test_a_key_of_the_user_is_cleared_everywhere(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        here, there = first.create_isolated_context("alice"), second.create_isolated_context("alice")
        for manager, context in ((first, here), (second, there)):
            manager.set_context("alice", context)
        assert await first.cleanup_context("alice") is True
        assert not here.is_open

        await until(lambda: there.lifetime.reason == "cleared", "it is cleared there too")
        await asyncio.to_thread(until_given_back, first)
        assert await first.cleanup_context("alice") is False

    async def test_nobody_is_cleared_for_another(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        bob = second.create_isolated_context("bob", "request-1")
        assert first.clear_context(("alice", "request-1")) is False
        await asyncio.sleep(0)

        assert bob.is_open

    async def test_who_clears_its_own_context_tells_the_others(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        here, there = first.create_isolated_context("alice"), second.create_isolated_context("alice")
        second.set_context("alice", there)
        first.set_context("alice", here)
        async with managed_user_context(here):
            assert first.clear_context("alice") is True

        await until(lambda: there.lifetime.reason == "cleared", "it is cleared there too")


def until_given_back(manager: UserContextManager) -> None:
    """Wait until the store knows of no context of alice."""
    cluster = manager.cluster
    assert cluster is not None
    wait_until(lambda: cluster.call(cluster.slots_of("alice")).result(10) == [], "all leases are given back")


async def _answer() -> str:
    return "done"
