"""What is live in the whole cluster, as plain values."""

import asyncio
from collections.abc import Collection
from typing import Any, Final

from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.store import Slot
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError

AT_ONCE: Final = 32
"""How many users the store is asked for at a time."""

PATIENCE: Final = 60.0
"""Seconds that whoever asks waits at most."""


def live_in_cluster(member: Member, users: Collection[str]) -> dict[str | tuple[str, str], dict[str, Any]]:
    """Each live lease of some users, on all workers. Waits for the store, in the thread that asks.

    Raises ClusterUnavailableError; and ConfigurationError on the cluster's own thread, which would wait for itself.
    """
    if member.thread.is_here:
        raise ConfigurationError("the cluster's own thread cannot wait for the store; ask it in another one")
    future = member.call(_slots(member, users))
    try:
        found = future.result(PATIENCE)
    except TimeoutError:
        future.cancel()
        raise ClusterUnavailableError("timeout") from None
    return {
        (user_id, f"{slot.tenancy}.{slot.number}"): _described(user_id, slot, member)
        for user_id, slots in found
        for slot in slots
    }


async def _slots(member: Member, users: Collection[str]) -> list[tuple[str, list[Slot]]]:
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(user_id: str) -> tuple[str, list[Slot]]:
        async with turns:
            return user_id, await member.slots_of(user_id)

    return await asyncio.gather(*map(ask, users))


def _described(user_id: str, slot: Slot, member: Member) -> dict[str, Any]:
    worker = slot.tenancy.partition("-")[0]
    return {
        "user_id": user_id,
        "worker": worker,
        "is_here": worker == member.book.worker,
        "is_connection": slot.is_connection,
    }
