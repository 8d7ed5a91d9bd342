"""What the store does for each kind of command, measured on a real Valkey with the adapter's own session: its CPU,
which counts reading, answering and the system's part; its time inside of the command; the bytes in and out; and memory.

What a batch costs is taken from two sizes of it: so much for the command, and so much for each item.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from ucm_middleware.cluster.store import Granted, Keep, Order, Place, Release, Renewal, Session, Slot, Store, UserKey

T = TypeVar("T")
Step = Callable[[], Awaitable[object]]

LEASE: Final = 600.0
"""Seconds: nothing expires while this runs."""

AT_ONCE: Final = 32
"""Commands under way, as from many workers: a server that is idle between two of them does more for each."""

BATCH: Final = 32
LISTENERS: Final = 8
"""Workers that listen to a user, where the telling is measured."""

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
    """``release`` and ``restore`` are of a command without items; what ends with ``_each`` is for one item. ``touch``
    is for one user in a renewal, ``delivery`` for one worker that is told of an event.
    """

    acquire: Cost
    release: Cost
    release_each: Cost
    renew: Cost
    touch: Cost
    restore: Cost
    restore_each: Cost
    publish: Cost
    delivery: Cost
    history: Cost
    notify: Cost
    subscribe: Cost
    tenancy_bytes: float
    user_bytes: float
    lease_bytes: float
    events_bytes: float
    event_bytes: float
    subscription_bytes: float
    version: str


def user() -> UserKey:
    """Anybody; in bucket 0."""
    return UserKey(0, secrets.token_hex(16))


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

    async def cost(self, steps: Sequence[Step]) -> Cost:
        """Of one of these steps, each of which is one command."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(step: Step) -> None:
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
        sizes: list[int] = [self._admin.memory_usage(key, samples=0) for key in found]
        return sum(sizes) / len(sizes)


def _over(more: Cost, less: Cost, items: int) -> Cost:
    """Of each of so many items that one command has more."""
    return Cost(
        max(0.0, (more.cpu - less.cpu) / items),
        max(0.0, (more.inside - less.inside) / items),
        max(0.0, (more.received - less.received) / items),
        max(0.0, (more.sent - less.sent) / items),
    )


def _difference(large: Cost, small: Cost, items: int) -> tuple[Cost, Cost]:
    """The cost of a command without items, and of an item, from one with ``items`` and one with a single item."""
    each = _over(large, small, items - 1)
    return small.and_for(-1, each), each


class Deaf:
    """Hears and does nothing."""

    def event(self, user: UserKey, place: Place, payload: bytes) -> None: ...
    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None: ...
    def deaf(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MeasuredStore:
    """A store with a session in which no bucket recovers."""

    store: Store
    session: Session
    admin: Any
    prefix: str


async def measure(measured: MeasuredStore, count: int, payload: int) -> Costs:
    """``count`` is how many commands of the cheap kinds, ``payload`` how many bytes an event has, sealed."""
    session, admin, prefix = measured.session, measured.admin, measured.prefix
    meter = Meter(admin)
    numbers = iter(range(1, 1 << 62))
    tenancy = f"{secrets.token_hex(8)}-1"

    def slot(of: UserKey | None = None) -> Slot:
        return Slot(user() if of is None else of, tenancy, next(numbers), False)

    async def take(taken: Slot) -> None:
        answer = await session.acquire(Order(taken, True, 1000, 1000, LEASE))
        if not isinstance(answer, Granted):
            raise AssertionError(f"an acquire was answered with {answer}")

    await take(slot())
    slots = [slot() for _ in range(count)]
    acquire = await meter.cost([partial(take, one) for one in slots])
    tenancy_bytes = meter.bytes_of(f"{prefix}{{0}}:t:*")
    user_bytes = meter.bytes_of(f"{prefix}{{0}}:u:*")
    somebody = user()
    for _ in range(8):
        await take(slot(somebody))
    with_eight = admin.memory_usage(f"{prefix}{{0}}:u:{somebody.digest}", samples=0)

    def renewing(*touch: UserKey) -> Step:
        return partial(session.renew, [Renewal(0, tenancy, LEASE, touch=touch)])

    renew = await meter.cost([renewing()] * count)
    held = [one.user for one in slots]
    touching = await meter.cost([renewing(*some) for some in _parts(held, BATCH)])

    singles, batched = slots[: count // 2], slots[count // 2 :]
    one_by_one = await meter.cost([partial(session.release, [Release(one)]) for one in singles])
    together = await meter.cost(
        [partial(session.release, [Release(one) for one in some]) for some in _parts(batched, BATCH)]
    )
    release, release_each = _difference(together, one_by_one, BATCH)

    users = [user() for _ in range(count // 4)]
    event = secrets.token_bytes(payload)

    def publishing() -> list[Step]:
        return [partial(session.publish, one, event, KEEP) for one in users]

    publish = await meter.cost(publishing())
    events_bytes = meter.bytes_of(f"{prefix}{{0}}:e:*")
    for _ in range(20):
        await session.publish(users[0], event, KEEP)
    with_more = admin.memory_usage(f"{prefix}{{0}}:e:{users[0].digest}", samples=0)
    again = await meter.cost(publishing())  # to streams that are there
    history = await meter.cost([partial(session.history, one, 0) for one in users])

    before = admin.info("memory")["used_memory"]
    subscribe, told = await _listening(measured, meter, users, publishing())
    subscription_bytes = (told[1] - before) / len(users) / LISTENERS

    notified = [user() for _ in range(count // 8)]
    for one in notified:
        await take(slot(one))
    notify = await meter.cost([partial(session.notify, one, event, forget_events=False) for one in notified])
    restore, restore_each = await _restoring(session, admin, meter, count)
    return Costs(
        acquire=acquire,
        release=release,
        release_each=release_each,
        renew=renew,
        touch=_over(touching, renew, BATCH),
        restore=restore,
        restore_each=restore_each,
        publish=publish,
        delivery=_over(told[0], again, LISTENERS),
        history=history,
        notify=notify,
        subscribe=subscribe,
        tenancy_bytes=tenancy_bytes,
        user_bytes=user_bytes,
        lease_bytes=(with_eight - user_bytes) / 7,
        events_bytes=events_bytes,
        event_bytes=max(0.0, (with_more - events_bytes) / 20),
        subscription_bytes=max(0.0, subscription_bytes),
        version=admin.info("server").get("valkey_version", admin.info("server")["redis_version"]),
    )


def _parts(many: Sequence[T], size: int) -> list[Sequence[T]]:
    return [many[at : at + size] for at in range(0, len(many) - size + 1, size)]


async def _listening(
    measured: MeasuredStore, meter: Meter, users: Sequence[UserKey], publishing: Sequence[Step]
) -> tuple[Cost, tuple[Cost, int]]:
    """What it costs to subscribe; to publish what some listen to; and the memory taken with all of them."""
    sessions = [measured.store.session() for _ in range(LISTENERS)]
    try:
        for session in sessions:
            await session.listen(Deaf())
        subscribe = await meter.cost([partial(session.subscribe, one) for session in sessions for one in users])
        used = measured.admin.info("memory")["used_memory"]
        return subscribe, (await meter.cost(publishing), used)
    finally:
        for session in sessions:
            await session.aclose()


async def _restoring(session: Session, admin: Any, meter: Meter, count: int) -> tuple[Cost, Cost]:
    admin.flushall()
    await session.enroll(LEASE)  # now every bucket recovers

    def restoring(slots: int) -> Step:
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
async def measured_store() -> AsyncGenerator[MeasuredStore]:
    """A Valkey of its own."""
    from support.restarts import url_at
    from support.valkey import start_valkey
    from ucm_valkey.cluster import open_store

    prefix = "ucm:measured:"
    with start_valkey() as server:
        store = open_store(url_at(server.port), prefix=prefix, seals=["seal"], timeout=5.0)
        session = store.session()
        try:
            await session.inspect()
            await asyncio.sleep(await session.enroll(0.1))
            yield MeasuredStore(store, session, server.admin, prefix)
        finally:
            await session.aclose()
