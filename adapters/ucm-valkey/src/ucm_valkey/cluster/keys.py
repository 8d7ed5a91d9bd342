"""Names of what is kept in a store. A bucket's have its number in braces, so that they stand on one node together."""

import re
from collections.abc import Sequence

from ucm_middleware.cluster.store import Slot, UserKey


class Keys:
    """Makes them, all under one prefix such as ``ucm:shop:``."""

    __slots__ = ("_buckets", "prefix")

    def __init__(self, prefix: str, buckets: int) -> None:
        self.prefix = prefix
        self._buckets: Sequence[str] = [f"{prefix}{{{bucket}}}:" for bucket in range(buckets)]

    @property
    def seal(self) -> str:
        """Whose the prefix is."""
        return f"{self.prefix}app"

    def engine(self, bucket: int) -> str:
        """Which run of a server has answered for the bucket, and since when."""
        return f"{self._buckets[bucket]}engine"

    def tenancy(self, bucket: int, tenancy: str) -> str:
        """A worker's claim, for as long as its lease."""
        return f"{self._buckets[bucket]}t:{tenancy}"

    def fence(self, bucket: int, tenancy: str) -> str:
        """Up to which number orders of a tenancy are late, from before it began."""
        return f"{self._buckets[bucket]}f:{tenancy}"

    def user(self, user: UserKey) -> str:
        """A user's leases, and the places of its events and notices."""
        return f"{self._buckets[user.bucket]}u:{user.digest}"

    def events(self, user: UserKey) -> str:
        """A user's kept events; also the channel that they are told on."""
        return f"{self._buckets[user.bucket]}e:{user.digest}"

    def notices(self, user: UserKey) -> str:
        """A user's notices."""
        return f"{self._buckets[user.bucket]}n:{user.digest}"

    def nudges(self, bucket: int) -> str:
        """The channel on which tenancies are told that they have notices."""
        return f"{self._buckets[bucket]}c"

    def probe(self, bucket: int) -> str:
        """A key that only an inspection uses."""
        return f"{self._buckets[bucket]}probe"

    def tag(self, bucket: int) -> str:
        """What decides where a bucket's keys stand."""
        return str(bucket)

    @property
    def every_user(self) -> str:
        """A pattern that the keys of all users match."""
        return re.sub(r"([\\*?\[\]])", r"\\\1", self.prefix) + "{*}:u:*"

    def user_of(self, key: str) -> UserKey:
        """The user of such a key."""
        bucket, _, digest = key.removeprefix(self.prefix).partition(":u:")
        return UserKey(int(bucket.strip("{}")), digest)


def lease_field(slot: Slot) -> str:
    """A lease's field in the hash of its user."""
    return f"l:{slot.tenancy}.{slot.number}"


def slot_of(user: UserKey, field: str, kind: str) -> Slot:
    """The lease of such a field."""
    tenancy, _, number = field.removeprefix("l:").rpartition(".")
    return Slot(user, tenancy, int(number), kind == "c")


def kind_of(slot: Slot) -> str:
    """A lease's value there."""
    return "c" if slot.is_connection else "r"
