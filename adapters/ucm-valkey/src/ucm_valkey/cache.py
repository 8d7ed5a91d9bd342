"""UserCache and SyncUserCache: the cache of one user, as it is given out."""

from collections.abc import AsyncGenerator, Generator, Mapping

from ucm_valkey.exchange import AsyncRunner, SyncRunner
from ucm_valkey.operations import Operations


class UserCache:
    """One user's entries, by name. Values are bytes; text is kept as UTF-8. Each entry has a time to live.

    Names are the application's, any text of up to 1024 bytes, and go to the server in clear behind the user's prefix.

    Every operation raises CacheUnavailableError when the server does not do it, InvalidContextError for a name, value
    or ``ttl`` (in seconds) that breaks a rule; given out by ``ValkeyCache.current()``, also CrossUserAccessError in
    another user's context and ContextClosedError after the teardown. An operation that is cancelled may have been done.
    """

    __slots__ = ("_operations", "_run")

    def __init__(self, runner: AsyncRunner, operations: Operations) -> None:
        self._run = runner.run
        self._operations = operations

    async def get(self, name: str) -> bytes | None:
        """The value, None when there is none."""
        return await self._run(self._operations.get(name))

    async def get_many(self, *names: str) -> dict[str, bytes]:
        """The values of those names that have one."""
        return await self._run(self._operations.get_many(names))

    async def set(
        self, name: str, value: bytes | str, *, ttl: float | None = None, only_if_missing: bool = False
    ) -> bool:
        """Keep a value for ``ttl`` seconds. False when there was one already and ``only_if_missing`` was asked for."""
        return await self._run(self._operations.set(name, value, ttl, only_if_missing))

    async def set_many(self, values: Mapping[str, bytes | str], *, ttl: float | None = None) -> None:
        """Keep several, in one round trip. When it raises, some of them may be kept."""
        await self._run(self._operations.set_many(values, ttl))

    async def delete(self, *names: str) -> int:
        """Forget these. Returns how many there were."""
        return await self._run(self._operations.delete(names))

    async def delete_if(self, name: str, value: bytes | str) -> bool:
        """Forget an entry if it has this value still: so a lock ends that ``set(only_if_missing=True)`` took."""
        return await self._run(self._operations.delete_if(name, value))

    async def incr(self, name: str, by: int = 1, *, ttl: float | None = None) -> int:
        """Add to a whole number and return the sum. ``ttl`` counts from when the entry was made."""
        return await self._run(self._operations.incr(name, by, ttl))

    async def expire(self, name: str, ttl: float | None = None) -> bool:
        """Let an entry live so long from now. False when there is none."""
        return await self._run(self._operations.expire(name, ttl))

    async def ttl(self, name: str) -> float | None:
        """How many seconds an entry has left; None when there is none."""
        return await self._run(self._operations.ttl(name))

    async def scan(self, beginning: str = "") -> AsyncGenerator[str]:
        """The user's names that begin so, in no order. It walks the whole database: for now and then."""
        seen: set[str] = set()
        cursor = 0
        while True:
            cursor, names = await self._run(self._operations.page(beginning, cursor))
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield name
            if cursor == 0:
                return

    async def clear(self) -> int:
        """Forget all of the user's entries. Walks the whole database, as ``scan`` does. Returns how many there were."""
        return await self._run(self._operations.clear())


class SyncUserCache:
    """The same for code that blocks: see ``UserCache``."""

    __slots__ = ("_operations", "_run")

    def __init__(self, runner: SyncRunner, operations: Operations) -> None:
        self._run = runner.run
        self._operations = operations

    def get(self, name: str) -> bytes | None:
        """The value, None when there is none."""
        return self._run(self._operations.get(name))

    def get_many(self, *names: str) -> dict[str, bytes]:
        """The values of those names that have one."""
        return self._run(self._operations.get_many(names))

    def set(self, name: str, value: bytes | str, *, ttl: float | None = None, only_if_missing: bool = False) -> bool:
        """Keep a value for ``ttl`` seconds. False when there was one already and ``only_if_missing`` was asked for."""
        return self._run(self._operations.set(name, value, ttl, only_if_missing))

    def set_many(self, values: Mapping[str, bytes | str], *, ttl: float | None = None) -> None:
        """Keep several, in one round trip. When it raises, some of them may be kept."""
        self._run(self._operations.set_many(values, ttl))

    def delete(self, *names: str) -> int:
        """Forget these. Returns how many there were."""
        return self._run(self._operations.delete(names))

    def delete_if(self, name: str, value: bytes | str) -> bool:
        """Forget an entry if it has this value still."""
        return self._run(self._operations.delete_if(name, value))

    def incr(self, name: str, by: int = 1, *, ttl: float | None = None) -> int:
        """Add to a whole number and return the sum. ``ttl`` counts from when the entry was made."""
        return self._run(self._operations.incr(name, by, ttl))

    def expire(self, name: str, ttl: float | None = None) -> bool:
        """Let an entry live so long from now. False when there is none."""
        return self._run(self._operations.expire(name, ttl))

    def ttl(self, name: str) -> float | None:
        """How many seconds an entry has left; None when there is none."""
        return self._run(self._operations.ttl(name))

    def scan(self, beginning: str = "") -> Generator[str]:
        """The user's names that begin so, in no order. It walks the whole database: for now and then."""
        seen: set[str] = set()
        cursor = 0
        while True:
            cursor, names = self._run(self._operations.page(beginning, cursor))
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield name
            if cursor == 0:
                return

    def clear(self) -> int:
        """Forget all of the user's entries. Walks the whole database, as ``scan`` does. Returns how many there were."""
        return self._run(self._operations.clear())
