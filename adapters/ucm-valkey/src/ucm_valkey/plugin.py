"""ValkeyCache and SyncValkeyCache: the plugins, which give each context its own user's cache."""

from dataclasses import replace
from typing import ClassVar, Final, Generic, TypeVar

from ucm_middleware import ConfigurationError, UnauthenticatedError, UserExecutionContext, current_context, hookimpl
from ucm_valkey.cache import SyncUserCache, UserCache
from ucm_valkey.exchange import AsyncExchange, AsyncRunner, Exchange, SyncExchange, SyncRunner, check_databases
from ucm_valkey.keys import checked_namespace, group_of, keys_of, login_of
from ucm_valkey.library import pool_of, shared_types
from ucm_valkey.operations import Limits, Operations
from ucm_valkey.server_users import Revocations, ServerUsers

DEFAULT_TTL: Final = 300.0
LONGEST_TTL: Final = 86_400.0
LARGEST_VALUE: Final = 1_048_576
KEEP_USERS: Final = 3600.0
PASSWORDS: Final = "valkey users"


E = TypeVar("E", bound=Exchange)


class _Plugin(Generic[E]):
    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(
        self,
        exchange: type[E],
        source: object,
        admin: object,
        namespace: str,
        limits: Limits,
        anonymous_ttl: float | None,
        keep_users: float,
    ) -> None:
        asynchronous = issubclass(exchange, AsyncExchange)
        self._data = self._admin = data = exchange(*pool_of(source, "source", asynchronous=asynchronous))
        users, group = None, ""
        if admin is not None:
            self._admin = exchange(*pool_of(admin, "admin", asynchronous=asynchronous))
            _ = data.own  # so that one that is missing is missed now
            check_databases(data, self._admin)
            group = group_of(namespace, data.database)
            users = ServerUsers(group, keep_users)
        self._namespace = checked_namespace(namespace)
        self._limits = limits
        self._anonymous = (
            None
            if anonymous_ttl is None
            else replace(limits, default_ttl=min(limits.default_ttl, anonymous_ttl), longest_ttl=anonymous_ttl)
        )
        self._users = users
        self._group = group
        self._pools = data.pool, self._admin.pool
        self._revocations = None if users is None else Revocations(users)
        if self._revocations is not None:
            # The hook of an instance: with prefixes alone, no request pays for one.
            self.ucm_context_closed = self._revocations.ucm_context_closed

    def _operations(self, context: UserExecutionContext) -> Operations:
        limits = self._limits
        if context.is_anonymous:
            if self._anonymous is None or self._users is not None:
                raise UnauthenticatedError(
                    "a cache belongs to a user, and the context has none yet: bind the identity first, or give the "
                    "cache an anonymous_ttl (not in the mode of server users), for entries of this context alone"
                )
            limits = self._anonymous
        keys = keys_of(context, self._namespace)
        if self._users is None or self._revocations is None:
            return Operations(keys, limits)
        host = context.host
        assert host is not None  # it has derived a key
        login = login_of(keys, self._group, host.subkeys(PASSWORDS)[0])
        self._revocations.logins[context] = login.name
        return Operations(keys, limits, login, self._users)

    @hookimpl
    def ucm_shared_types(self) -> list[type]:
        return [_Plugin, AsyncRunner, SyncRunner, Exchange, ServerUsers, *shared_types(self._data.library)]

    @hookimpl
    def ucm_bind_session(self, session: object) -> None:
        pool = getattr(session, "connection_pool", session)
        if any(pool is each for each in self._pools):
            raise ConfigurationError(
                "the session is the client that the caches of all users share, and reaches everybody's entries: give "
                "the context none, and take cache.current()"
            )


class ValkeyCache(_Plugin[AsyncExchange]):
    """Gives each context its own user's cache, on a pool or client of ``redis.asyncio`` or ``valkey.asyncio``.

    The adapter takes the pool of a client; nothing else should use it. Close it yourself. Users are told apart by the
    prefixes of their keys; with ``admin``, another pool or client whose login may make users, by the server as well.

    ``namespace`` names the cache: another one has other keys. ``default_ttl`` and ``longest_ttl`` are in seconds,
    ``largest_value`` in bytes. ``anonymous_ttl`` gives contexts without a user a cache too, whose entries live so long
    at most; without it they are refused. ``keep_users`` is how long, in seconds, an unused user stays on the server.

    Raises ConfigurationError for what is no pool, and for limits that are none.
    """

    def __init__(
        self,
        source: object,
        *,
        admin: object = None,
        namespace: str = "cache",
        default_ttl: float = DEFAULT_TTL,
        longest_ttl: float = LONGEST_TTL,
        largest_value: int = LARGEST_VALUE,
        anonymous_ttl: float | None = None,
        keep_users: float = KEEP_USERS,
    ) -> None:
        limits = Limits(default_ttl, longest_ttl, largest_value)
        super().__init__(AsyncExchange, source, admin, namespace, limits, anonymous_ttl, keep_users)
        self._runner = AsyncRunner(self._data, self._admin)

    def current(self) -> UserCache:
        """The cache of the user whom the calling code runs for, as an owned handle: it works for that user's code,
        until the context closes.

        Raises ContextNotFoundError outside of a context, ContextClosedError in code that outlived its own,
        UnauthenticatedError in a context without a user, and ConfigurationError in production without a secret.
        """
        context = current_context()
        return context.own(UserCache(self._runner, self._operations(context)), name="cache")

    async def remove_unused_users(self) -> int:
        """Remove from the server the users that nobody used for ``keep_users`` seconds; returns how many.

        This happens by itself as well, now and then, when users are made. Raises CacheUnavailableError.
        """
        return 0 if self._users is None else await self._runner.run(self._users.sweep())


class SyncValkeyCache(_Plugin[SyncExchange]):
    """The same on a pool or client of ``redis`` or ``valkey``, for code that blocks: see ``ValkeyCache``."""

    def __init__(
        self,
        source: object,
        *,
        admin: object = None,
        namespace: str = "cache",
        default_ttl: float = DEFAULT_TTL,
        longest_ttl: float = LONGEST_TTL,
        largest_value: int = LARGEST_VALUE,
        anonymous_ttl: float | None = None,
        keep_users: float = KEEP_USERS,
    ) -> None:
        limits = Limits(default_ttl, longest_ttl, largest_value)
        super().__init__(SyncExchange, source, admin, namespace, limits, anonymous_ttl, keep_users)
        self._runner = SyncRunner(self._data, self._admin)

    def current(self) -> SyncUserCache:
        """The cache of the user whom the calling code runs for; see ``ValkeyCache.current``."""
        context = current_context()
        return context.own(SyncUserCache(self._runner, self._operations(context)), name="cache")

    def remove_unused_users(self) -> int:
        """Remove from the server the users that nobody used for ``keep_users`` seconds; returns how many.

        This happens by itself as well, now and then, when users are made. Raises CacheUnavailableError.
        """
        return 0 if self._users is None else self._runner.run(self._users.sweep())
