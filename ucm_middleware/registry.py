"""The table of live contexts: under which keys, whose they are, how many, and until when."""

import threading
from collections.abc import Callable, Iterable
from typing import Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextClosedError, ContextLimitError, CrossUserAccessError
from ucm_middleware.expiry import Deadlines, Timed
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.lifetime import CloseReason

Key = str | tuple[str, str]
"""A user's own id, any other key of theirs, or the pair (user id, request id)."""

Displaced = dict[UserExecutionContext, CloseReason]
"""Contexts that must be closed, once the lock is released, and why."""

NO_DEADLINE: Final = float("inf")
RETRY: Final = 1.0
"""Seconds until a context that could not be closed is tried again."""

SLICE: Final = 256
"""How many expired contexts are taken out at a time, so that the lock is never held for long."""


class Entry(Timed):
    """One live context and the keys it stands under."""

    __slots__ = ("context", "keys")

    def __init__(self, context: UserExecutionContext, key: Key) -> None:
        super().__init__(NO_DEADLINE)
        self.context = context
        self.keys: tuple[Key, ...] = (key,)


class Limits:
    """How many live root contexts there may be: of one user, of all named users, and of anonymous ones."""

    __slots__ = ("anonymous", "per_user", "total")

    def __init__(self, per_user: int, total: int, anonymous: int) -> None:
        self.per_user = per_user
        self.total = total
        self.anonymous = anonymous


class Registry:
    """Thread-safe. Its lock is held for single operations, whose cost does not grow with the number of contexts."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.clock = clock
        self._start_empty()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the contexts, and the connections they hold, are the parent's."""
        self._start_empty()

    def _start_empty(self) -> None:
        # The lock is reentrant: a finalizer or a signal handler may close a context in the middle of an operation. So
        # what is walked is a snapshot, and what was checked before a step is checked again after it.
        self._lock = threading.RLock()
        self._by_key: dict[Key, Entry] = {}
        self._by_owner: dict[str, dict[UserExecutionContext, Entry]] = {}
        self._deadlines = (Deadlines(), Deadlines())  # of named users, of anonymous ones
        self._named = 0
        self._anonymous = 0

    def __len__(self) -> int:
        return self._named + self._anonymous

    def lookup(self, key: Key) -> UserExecutionContext | None:
        """The context under a key, expired or not."""
        entry = self._by_key.get(key)
        return None if entry is None else entry.context

    def insert(
        self,
        context: UserExecutionContext,
        key: Key,
        ttl: float | None,
        usual_ttl: float | None = None,
        also: Key | None = None,
    ) -> Displaced:
        """Put a context under a key, and under one more of its owner's. Returns whom to close now, and why.

        ``usual_ttl`` is for a context that is new here, when ``ttl`` is None; one that is in already keeps its
        deadline.

        Raises CrossUserAccessError when the key is another user's, ContextLimitError when there are too many contexts.
        """
        owner = context.user_id
        with self._lock:
            now = self.clock()
            if not context.is_open:  # whoever closed it has looked for it here already, or waits for the lock
                raise _closed(context)
            displaced = self._make_way(context, key)
            if also is not None:
                displaced.update(self._make_way(context, also))
            mine = self._by_owner.get(owner)
            entry = None if mine is None else mine.get(context)
            if entry is None:
                self._make_room(owner, context.is_anonymous, displaced, now)
                self._evict_squatter(owner, context)
                entry = Entry(context, key)
                self._by_owner.setdefault(owner, {})[context] = entry
                self._count(context.is_anonymous, 1)
                ttl = usual_ttl if ttl is None else ttl
            elif key not in entry.keys:
                entry.keys += (key,)
            self._by_key[key] = entry
            if also is not None:
                self._by_key[also] = entry
                entry.keys += () if also in entry.keys else (also,)
            if ttl is not None:
                self._set_deadline(entry, now + ttl, now)
        return displaced

    def remove(self, context: UserExecutionContext) -> bool:
        """Take a context out, and free its keys. False when it was not in."""
        with self._lock:
            owner = context.user_id  # a late binding may just have changed it, under this lock
            mine = self._by_owner.get(owner)
            entry = None if mine is None else mine.pop(context, None)
            if mine is None or entry is None:
                return False
            if not mine:
                del self._by_owner[owner]
            self._count(context.is_anonymous, -1)
            for key in entry.keys:
                if self._by_key.get(key) is entry:
                    del self._by_key[key]
            if entry.deadline != NO_DEADLINE:
                self._deadlines[context.is_anonymous].discard(entry)
            return True

    def rebind(self, context: UserExecutionContext, user_id: str, transition: Callable[[], bool]) -> Displaced:
        """Move an anonymous context to its user. ``transition`` does the binding, with the lock held.

        Returns the contexts that must be closed for it. Raises ContextLimitError when the user has too many contexts.
        """
        old = context.user_id
        displaced: Displaced = {}
        with self._lock:
            entry = self._by_owner.get(old, {}).get(context)
            if entry is None:
                return displaced
            now = self.clock()
            self._make_room(user_id, False, displaced, now)
            if transition():
                self._evict_squatter(user_id, context)
                if entry.deadline != NO_DEADLINE:
                    self._deadlines[True].discard(entry)
                    self._deadlines[False].add(entry, now)
                del self._by_owner[old]
                self._by_owner.setdefault(user_id, {})[context] = entry
                self._count(True, -1)
                self._count(False, 1)
                self._rename(entry, old, user_id, displaced)
        return displaced

    def _rename(self, entry: Entry, old: str, user_id: str, displaced: Displaced) -> None:
        """Put an entry under its owner's new id, in each pair that it stands under."""
        renamed: list[Key] = []
        for key in entry.keys:
            if key[0] == old and isinstance(key, tuple):
                self._by_key.pop(key, None)
                key = (user_id, key[1])
                present = self._by_key.get(key)
                if present is not None:
                    displaced[present.context] = "replaced" if self._is_live(present.context) else "expired"
                self._by_key[key] = entry
            renamed.append(key)
        entry.keys = tuple(renamed)

    def limit(self, context: UserExecutionContext, seconds: float) -> float | None:
        """Let a context live so many seconds more at most, whatever it is given later. Returns its deadline."""
        with self._lock:
            entry = self._by_owner.get(context.user_id, {}).get(context)
            if entry is None:
                return None
            now = self.clock()
            context.lifetime.limit(now + seconds, self.clock)
            self._set_deadline(entry, entry.deadline, now)
            return entry.deadline

    def live(self) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot: every live context with the first key it stands under."""
        with self._lock:
            entries = [entry for mine in list(self._by_owner.values()) for entry in list(mine.values())]
            return [(entry.keys[0], entry.context) for entry in entries]

    def live_of(self, user_ids: Iterable[str]) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot of some users' live contexts."""
        with self._lock:
            entries = [entry for user_id in user_ids for entry in list(self._by_owner.get(user_id, {}).values())]
            return [(entry.keys[0], entry.context) for entry in entries]

    def take_due(self) -> list[UserExecutionContext]:
        """Some contexts whose deadline has come; call again until there are none. They stay in until they close."""
        with self._lock:
            now = self.clock()
            due = [entry for deadlines in self._deadlines for entry in deadlines.pop_due(now, SLICE)]
            return [entry.context for entry in due if isinstance(entry, Entry)]

    def postpone(self, context: UserExecutionContext) -> None:
        """Let ``take_due`` offer a context again, a second from now."""
        with self._lock:
            entry = self._by_owner.get(context.user_id, {}).get(context)
            if entry is not None:
                now = self.clock()
                self._deadlines[context.is_anonymous].add(entry, now, RETRY)

    def next_wake(self) -> float | None:
        """When the next deadline must be looked at, on the registry's clock."""
        with self._lock:
            wakes = [deadlines.next_wake() for deadlines in self._deadlines]
            return min((wake for wake in wakes if wake is not None), default=None)

    def _make_way(self, context: UserExecutionContext, key: Key) -> Displaced:
        """Who must go so that the context can stand under the key."""
        owner = context.user_id
        displaced: Displaced = {}
        if isinstance(key, tuple) and key[0] != owner:
            raise _foreign_key()
        present = self._by_key.get(key)
        if present is not None and present.context is not context:
            if not self._is_live(present.context):
                displaced[present.context] = "expired"
            elif present.context.user_id == owner:
                displaced[present.context] = "replaced"
            elif key == owner:
                displaced[present.context] = "evicted"
            else:
                raise _foreign_key()
        if key != owner and isinstance(key, str) and any(map(self._is_live, list(self._by_owner.get(key, ())))):
            raise _foreign_key()
        return displaced

    def _evict_squatter(self, owner: str, context: UserExecutionContext) -> None:
        """A key that equals a user id belongs to that user, whoever stood there before the user came.

        Whoever did loses the key, and lives on under the pair that every context has.
        """
        squatter = self._by_key.get(owner)
        if squatter is None or squatter.context is context or squatter.context.user_id == owner:
            return
        del self._by_key[owner]
        pair = (squatter.context.user_id, squatter.context.request_id)
        squatter.keys = tuple(key for key in squatter.keys if key != owner) or (pair,)
        self._by_key.setdefault(squatter.keys[0], squatter)

    def _make_room(self, owner: str, anonymous: bool, displaced: Displaced, now: float) -> None:
        """Check the limits. Contexts that have expired do not count: they are displaced."""
        limits = self.limits
        mine = self._by_owner.get(owner)
        if not anonymous and mine is not None and len(mine) >= limits.per_user:
            displaced.update((context, "expired") for context in list(mine) if not self._is_live(context))
            if len(mine) - sum(context in mine for context in displaced) >= limits.per_user:
                raise ContextLimitError("user", limits.per_user, "finish or close one of this user's contexts first")
        live, limit = (self._anonymous, limits.anonymous) if anonymous else (self._named, limits.total)
        if live < limit:
            return
        due = [entry for entry in self._deadlines[anonymous].pop_due(now, SLICE) if isinstance(entry, Entry)]
        displaced.update((entry.context, "expired") for entry in due)  # one is enough to make room
        if live - sum(context.is_anonymous == anonymous for context in displaced) >= limit:
            scope = "anonymous" if anonymous else "total"
            raise ContextLimitError(scope, limit, "the server is at its limit; try again shortly")

    def _is_live(self, context: UserExecutionContext) -> bool:
        lifetime = context.lifetime
        return lifetime.is_open and not lifetime.is_expired

    def _count(self, anonymous: bool, by: int) -> None:
        if anonymous:
            self._anonymous += by
        else:
            self._named += by

    def _set_deadline(self, entry: Entry, deadline: float, now: float) -> None:
        deadlines = self._deadlines[entry.context.is_anonymous]
        if entry.deadline != NO_DEADLINE:
            deadlines.discard(entry)
        entry.deadline = entry.context.lifetime.expire_at(deadline, self.clock)
        deadlines.add(entry, now)


def _foreign_key() -> CrossUserAccessError:
    return CrossUserAccessError("this key is not yours: choose another, or none")


def _closed(context: UserExecutionContext) -> ContextClosedError:
    lifetime = context.lifetime
    return ContextClosedError(context.request_id, lifetime.where(), lifetime.reason or "closed")
