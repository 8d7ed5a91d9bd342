"""The store, for one event loop: each method is one script, and one round trip."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from ucm_middleware import ClusterUnavailableError, ConfigurationError
from ucm_middleware.cluster.store import (
    BUCKETS,
    KEEP_USER,
    Alive,
    Gone,
    Granted,
    Hearer,
    History,
    Keep,
    Late,
    Notified,
    Order,
    Published,
    Recovering,
    Refused,
    Release,
    Renewal,
    Slot,
    UserKey,
)
from ucm_valkey.cluster import answers, scripts
from ucm_valkey.cluster.asking import Asking, done
from ucm_valkey.cluster.clients import Client
from ucm_valkey.cluster.faults import StoreError
from ucm_valkey.cluster.inspection import Inspection
from ucm_valkey.cluster.keys import Keys, kind_of, lease_field
from ucm_valkey.cluster.lines import RUN, Line, Word
from ucm_valkey.cluster.listening import Listener
from ucm_valkey.cluster.topology import ManyServers, OneServer, Topology

T = TypeVar("T")

A_DAY: Final = 86_400_000
"""Milliseconds that the seal stands, and a notice is kept."""

MOST_NOTICES: Final = 64
"""Notices that are kept of a user."""

MOST_KEYS: Final = 300
"""Keys of one script: a server does nothing else while it runs."""

LIFE: Final = round(KEEP_USER * 1000)
FOREIGN: Final = (
    "cluster: the keys of this application are another's, or another secret's: two applications must not share the "
    "name that ClusterPolicy.application gives; give each a name of its own, or to workers of one application the "
    "same secret"
)


class ValkeySession:
    """Used in the loop that it was made in, and nowhere else."""

    def __init__(self, client: Client, keys: Keys, seals: Sequence[str]) -> None:
        self._client = client
        self._keys = keys
        self._seals = seals
        self._topology: Topology = ManyServers(client) if client.target.is_cluster else OneServer(client)
        self._asking = Asking(self._topology)
        self._listener = Listener(client, self._asking, keys)

    async def inspect(self) -> int:
        """Which of the application's seals stands in the store. Raises ConfigurationError for a server that cannot
        serve.
        """
        try:
            lines = {bucket: await self._asking.line(self._keys.tag(bucket)) for bucket in range(BUCKETS)}
        except StoreError as error:
            raise error.at_start() from None
        inspected: set[Line] = set()
        for bucket, line in lines.items():
            if line not in inspected:
                inspected.add(line)
                await Inspection(self._client, (line.host, line.port), self._keys, bucket).run()
        return await self._seal()

    async def enroll(self, lease: float) -> float:
        """See each bucket, and keep the seal for a day more."""
        groups = self._topology.together([self._keys.tag(bucket) for bucket in range(BUCKETS)])
        seen = await asyncio.gather(
            *(
                self._asking.run(
                    scripts.ENROLL, group[0], [self._keys.engine(int(tag)) for tag in group], RUN, _ms(lease)
                )
                for group in groups
            )
        )
        await self._seal()
        return max(answers.number(each) for each in seen) / 1000

    async def is_full(self) -> bool:
        """Whether a server has no memory left."""
        buckets = {line: bucket for bucket in range(BUCKETS) if (line := self._topology.line(self._keys.tag(bucket)))}
        found = await asyncio.gather(*map(self._is_full, buckets.values()))
        return any(found)

    async def acquire(self, order: Order) -> Granted | Refused | Gone | Late | Recovering:
        """Check and take a slot, atomically."""
        slot, keys = order.slot, self._keys
        user, bucket = slot.user, slot.user.bucket
        answer = await self._asking.run(
            scripts.ACQUIRE,
            keys.tag(bucket),
            (
                keys.engine(bucket),
                keys.tenancy(bucket, slot.tenancy),
                keys.user(user),
                keys.fence(bucket, slot.tenancy),
            ),
            RUN,
            _ms(order.lease),
            slot.tenancy,
            slot.number,
            lease_field(slot),
            kind_of(slot),
            order.per_user,
            order.connections,
            int(order.begins),
            LIFE,
        )
        return answers.acquired(answer)

    async def release(self, releases: Sequence[Release]) -> None:
        """Give up leases; those that are not there any more are passed over."""
        keys = self._keys
        by_tag: dict[str, list[Release]] = {}
        for release in releases:
            by_tag.setdefault(keys.tag(release.slot.user.bucket), []).append(release)
        parts = [
            (group[0], part)
            for group in self._topology.together(list(by_tag))
            if group
            for part in _parts([release for tag in group for release in by_tag[tag]], MOST_KEYS // 3)
        ]
        await asyncio.gather(*(self._release(tag, part) for tag, part in parts))

    async def renew(self, renewals: Sequence[Renewal]) -> list[Alive | Gone | Recovering | None]:
        """Renew tenancies, answered in order; None for those whose node gave no answer, where another did."""
        found: dict[int, Alive | Gone | Recovering] = {}
        by_tag: dict[str, list[int]] = {}
        for place, renewal in enumerate(renewals):
            by_tag.setdefault(self._keys.tag(renewal.bucket), []).append(place)

        async def one(tag: str, places: Sequence[int]) -> None:
            some = await self._renew(tag, [renewals[place] for place in places])
            found.update(zip(places, some, strict=True))

        outcomes = await asyncio.gather(
            *(
                one(group[0], part)
                for group in self._topology.together(list(by_tag))
                if group
                for part in _renewed_together([place for tag in group for place in by_tag[tag]], renewals)
            ),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if outcome is not None and (not found or not isinstance(outcome, ClusterUnavailableError)):
                raise outcome
        return [found.get(place) for place in range(len(renewals))]

    async def restore(self, bucket: int, tenancy: str, lease: float, slots: Sequence[Slot]) -> bool:
        """Put back what is held, while the bucket recovers. False once that is over: it is lost then."""
        restored = [
            await self._asking.run(
                scripts.RESTORE,
                self._keys.tag(bucket),
                [
                    self._keys.engine(bucket),
                    self._keys.tenancy(bucket, tenancy),
                    *(self._keys.user(slot.user) for slot in part),
                ],
                RUN,
                _ms(lease),
                LIFE,
                *(word for slot in part for word in (lease_field(slot), kind_of(slot))),
            )
            for part in (_parts(slots, MOST_KEYS) if slots else [()])
        ]
        return all(restored)

    async def publish(self, user: UserKey, payload: bytes, keep: Keep) -> Published:
        """Give an event its place, keep it, and tell it to the sessions that are subscribed to the user."""
        keys = self._keys
        channel = keys.events(user)
        answer = await self._asking.run(
            scripts.PUBLISH,
            keys.tag(user.bucket),
            (keys.user(user), channel),
            RUN,
            secrets.token_hex(4),
            payload,
            channel,
            keep.events,
            keep.size,
            max(_ms(keep.seconds), 1),
            LIFE,
            keys.tenancy(user.bucket, ""),
        )
        return answers.published(answer)

    async def history(self, user: UserKey, after: int) -> History:
        """The kept events after a sequence, and the newest place."""
        keys = self._keys
        answer = await self._asking.run(
            scripts.HISTORY, keys.tag(user.bucket), (keys.user(user), keys.events(user)), max(after, 0)
        )
        return answers.history(answer)

    async def notify(self, user: UserKey, notice: bytes, *, forget_events: bool) -> Notified:
        """Leave a notice to every worker that has a lease of the user, and nudge them. It is kept for a day."""
        keys = self._keys
        answer = await self._asking.run(
            scripts.NOTIFY,
            keys.tag(user.bucket),
            (keys.user(user), keys.notices(user), keys.events(user)),
            notice,
            int(forget_events),
            keys.nudges(user.bucket),
            keys.tenancy(user.bucket, ""),
            user.digest,
            A_DAY,
            MOST_NOTICES,
        )
        return answers.notified(answer)

    async def notices(self, user: UserKey, after: str) -> list[tuple[str, bytes]]:
        """The user's notices after a position, each with its own."""
        command = ("XRANGE", self._keys.notices(user), f"({after}" if after else "-", "+")
        return answers.entries_of(done(await self._asking.send(self._keys.tag(user.bucket), command)))

    async def leases_of(self, user: UserKey) -> list[Slot]:
        """A user's live leases, on all workers."""
        keys = self._keys
        answer = await self._asking.run(
            scripts.LEASES, keys.tag(user.bucket), (keys.user(user),), keys.tenancy(user.bucket, "")
        )
        return answers.slots(user, answer)

    async def count(self) -> tuple[int, int]:
        """How many leases are live, and of how many users."""
        leases = users = 0
        for line in await self._topology.lines():
            cursor = b"0"
            while True:
                asked = ("SCAN", cursor, "MATCH", self._keys.every_user, "COUNT", 1000)
                cursor, names = answers.scanned(done(await line.ask(asked)))
                held = await asyncio.gather(*(self.leases_of(self._keys.user_of(name)) for name in set(names)))
                leases += sum(map(len, held))
                users += sum(1 for each in held if each)
                if cursor == b"0":
                    break
        return leases, users

    async def listen(self, hearer: Hearer) -> None:
        """Hear from now on. When it raises ClusterUnavailableError, it goes on trying, and tells of it by ``deaf``."""
        await self._listener.listen(hearer, BUCKETS)

    async def subscribe(self, user: UserKey) -> None:
        """Hear a user's events; when it returns, the store has confirmed it."""
        await self._listener.subscribe(user)

    async def unsubscribe(self, user: UserKey) -> None:
        """Hear them no longer."""
        await self._listener.unsubscribe(user)

    async def aclose(self) -> None:
        """Give up the connections."""
        await self._listener.aclose()
        await self._topology.aclose()

    async def _is_full(self, bucket: int) -> bool:
        try:
            await self._asking.run(scripts.ROOM, self._keys.tag(bucket), (self._keys.engine(bucket),))
        except StoreError as error:
            if error.reason != "memory":
                raise
            return True
        return False

    async def _seal(self) -> int:
        key = self._keys.seal
        found = answers.number(await self._asking.run(scripts.SEAL, key, (key,), A_DAY, *self._seals))
        if found < 0:
            raise ConfigurationError(FOREIGN)
        return found

    async def _release(self, tag: str, releases: Sequence[Release]) -> None:
        keys: list[str] = []
        arguments: list[Word] = []
        for release in releases:
            slot = release.slot
            bucket = slot.user.bucket
            keys += (
                self._keys.user(slot.user),
                self._keys.tenancy(bucket, slot.tenancy),
                self._keys.fence(bucket, slot.tenancy),
            )
            arguments += (lease_field(slot), slot.number if release.fence else "")
        await self._asking.run(scripts.RELEASE, tag, keys, LIFE, *arguments)

    async def _renew(self, tag: str, renewals: Sequence[Renewal]) -> list[Alive | Gone | Recovering]:
        keys: list[str] = []
        arguments: list[Word] = []
        for renewal in renewals:
            keys += (
                self._keys.engine(renewal.bucket),
                self._keys.tenancy(renewal.bucket, renewal.tenancy),
                *(self._keys.user(user) for user in renewal.touch),
            )
            arguments += (_ms(renewal.lease), len(renewal.touch), len(renewal.told))
            arguments += (word for pair in renewal.told for word in pair)
        answer = await self._asking.run(scripts.RENEW, tag, keys, RUN, LIFE, *arguments)
        return answers.renewed(answer, len(renewals))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _renewed_together(places: Sequence[int], renewals: Sequence[Renewal]) -> Iterator[Sequence[int]]:
    """The places in parts of ``MOST_KEYS`` keys, or of one renewal that has more by itself."""
    part: list[int] = []
    size = 0
    for place in places:
        keys = 2 + len(renewals[place].touch)
        if part and size + keys > MOST_KEYS:
            yield part
            part, size = [], 0
        part.append(place)
        size += keys
    if part:
        yield part
