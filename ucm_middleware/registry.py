"""The table of live contexts: under which keys, whose they are, how many, and until when."""

# pyright: reportPrivateUsage=false
# Each request comes through here twice: the fields of the context are read where they are.

import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextClosedError, ContextLimitError, CrossUserAccessError
from ucm_middleware.expiry import Deadlines
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.lifetime import OPEN, UNBOUND, CloseReason

P = ParamSpec("P")
T = TypeVar("T")

Key = str | tuple[str, str]
"""A user's own id, any other key of theirs, or the pair (user id, request id)."""

Displaced = dict[UserExecutionContext, CloseReason]
"""Contexts that must be closed, once the lock is released, and why."""

RETRY: Final = 1.0
"""Seconds until a context that could not be closed is tried again."""

SLICE: Final = 256
"""How many expired contexts are taken out at a time, so that the lock is never held for long."""


class Limits:
    """How many live root contexts there may be: of one user, of all named users, and of anonymous ones."""

    __slots__ = ("anonymous", "per_user", "total")

    def __init__(self, per_user: int, total: int, anonymous: int) -> None:
        self.per_user = per_user
        self.total = total
        self.anonymous = anonymous


def _exclusive(
    method: Callable[Concatenate["Registry", P], T],
) -> Callable[Concatenate["Registry", P], T]:
    """Run a method under the registry's lock, and let it be seen that somebody does.

    Under the GIL, threads, finalizers and signal handlers come in between calls only. So a few lines that call nothing
    are atomic by themselves: where they find ``_held`` at 0, no operation under the lock is in its middle, and they
    need not take it. A debugger that traces lines is a call at each of them: under one, counts may drift among threads.
    """

    @wraps(method)
    def exclusive(registry: "Registry", /, *args: P.args, **kwargs: P.kwargs) -> T:
        # The lock's own way in and out, which no signal handler that raises can come in the middle of.
        with registry._lock:
            held = registry._held
            registry._held = held + 1
            try:
                return method(registry, *args, **kwargs)
            finally:
                registry._held = held

    return exclusive


class Registry:
    """Thread-safe. Its lock is held for single operations, whose cost does not grow with the number of contexts.

    Most users have one context, under the pair (user id, request id): those stand in one table, by their owner alone.
    Whatever else an owner has, a second context or another key, unfolds that entry into the tables of keys and of
    owners.
    """

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
        # what is walked is a snapshot, and what was checked before a call is checked again after it: only between
        # calls can nothing happen.
        self._lock = threading.RLock()
        self._held = 0
        self._lone: dict[str, UserExecutionContext] = {}
        self._by_key: dict[Key, UserExecutionContext] = {}
        self._by_owner: dict[str, dict[UserExecutionContext, None]] = {}
        self._deadlines = (Deadlines[UserExecutionContext](), Deadlines[UserExecutionContext]())
        # Each for the named and for the anonymous ones, in this order.
        self._live = [0, 0]
        self._most = (self.limits.total, self.limits.anonymous)

    def __len__(self) -> int:
        return sum(self._live)

    def lookup(self, key: Key) -> UserExecutionContext | None:
        """The context under a key, expired or not."""
        if isinstance(key, tuple):
            lone = self._lone.get(key[0])
            if lone is not None and lone.request_id == key[1]:
                return lone
        return self._by_key.get(key)  # second: one that was unfolded in between is here by now

    @_exclusive
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
        if not context.is_open:  # whoever closed it has looked for it here already, or waits for the lock
            raise _closed(context)
        displaced = self._make_way(context, key)
        if also is not None:
            displaced.update(self._make_way(context, also))
        mine = self._unfold(owner)
        is_new = mine is None or context not in mine
        if is_new:
            self._make_room(owner, context.is_anonymous, displaced)
            self._evict_squatter(owner, context)
            context.registry_keys = (key,)
            group = {context: None}
            if owner in self._by_owner:
                self._by_owner[owner][context] = None
            else:
                self._by_owner[owner] = group
            self._live[context.is_anonymous] += 1
            ttl = usual_ttl if ttl is None else ttl
        elif key not in context.registry_keys:
            context.registry_keys += (key,)
        self._by_key[key] = context
        if also is not None:
            self._by_key[also] = context
            context.registry_keys += () if also in context.registry_keys else (also,)
        if ttl is not None:
            self._set_deadline(context, ttl)
        elif is_new:
            self._queue(context)  # its user's credentials may end
        return displaced

    def admit(self, context: UserExecutionContext, ttl: float | None) -> Displaced | None:
        """The same for a new context under the pair of its user and its request, which is nearly always alone.

        None when nothing must be closed.
        """
        owner, lifetime, anonymous = context._user_id, context._lifetime, context._anonymous
        queue = None
        if lifetime.deadline is not None:  # a plugin has bound it to credentials that end
            return self.insert(context, (owner, context.request_id), ttl)
        if ttl is not None:
            now = self.clock()
            deadline = lifetime.expire_at(now + ttl, self.clock)
            queues = self._deadlines[anonymous].queues
            if ttl in queues:
                queue = queues[ttl]
                lifetime.wake = deadline
                lifetime.wait = ttl
            else:
                self._deadlines[anonymous].open_queue(ttl)
                queue = self._deadlines[anonymous].queue_for(lifetime, now, ttl)
        if (  # without the lock, which would cost more than all the rest; see _exclusive
            self._held == 0
            and (lifetime.state is OPEN or lifetime.state is UNBOUND)  # from here on, who closes it finds it here
            and owner not in self._lone
            and owner not in self._by_owner
            and owner not in self._by_key  # a squatter
            and self._live[anonymous] < self._most[anonymous]
        ):
            self._lone[owner] = context
            self._live[anonymous] += 1
            if queue is not None:
                queue[lifetime] = context
            return None
        return self.insert(context, (owner, context.request_id), ttl)

    def _unfold(self, owner: str) -> dict[UserExecutionContext, None] | None:
        """An owner's contexts in the general form."""
        while owner in self._lone:
            context = self._lone[owner]
            keys: tuple[Key, ...] = ((owner, context.request_id),)
            group: dict[UserExecutionContext, None] = {context: None}
            if owner in self._lone and self._lone[owner] is context:
                context.registry_keys = keys
                self._by_key[keys[0]] = context
                self._by_owner[owner] = group
                del self._lone[owner]
        return self._by_owner.get(owner)

    def remove(self, context: UserExecutionContext) -> bool:
        """Take a context out, and free its keys. False when it was not in."""
        lifetime = context._lifetime
        owner = context._user_id
        if self._held == 0 and owner in self._lone and self._lone[owner] is context:  # as above
            del self._lone[owner]
            self._live[context._anonymous] -= 1
            queues = self._deadlines[context._anonymous].queues
            if lifetime.wait in queues and lifetime in queues[lifetime.wait]:
                del queues[lifetime.wait][lifetime]
            return True
        return self._remove(context)

    @_exclusive
    def _remove(self, context: UserExecutionContext) -> bool:
        lifetime = context._lifetime
        owner = context.user_id  # a late binding may just have changed it, under this lock
        if owner in self._lone and self._lone[owner] is context:
            del self._lone[owner]
        elif not self._remove_from_group(owner, context):
            return False
        self._live[context.is_anonymous] -= 1
        self._deadlines[context.is_anonymous].discard(lifetime)
        return True

    def _remove_from_group(self, owner: str, context: UserExecutionContext) -> bool:
        mine = self._by_owner.get(owner)
        if mine is None or context not in mine:
            return False
        del mine[context]
        if not mine:
            del self._by_owner[owner]
        for key in context.registry_keys:
            if key in self._by_key and self._by_key[key] is context:
                del self._by_key[key]
        return True

    @_exclusive
    def rebind(self, context: UserExecutionContext, user_id: str, transition: Callable[[], bool]) -> Displaced:
        """Move an anonymous context to its user. ``transition`` does the binding, with the lock held.

        Returns the contexts that must be closed for it. Raises ContextLimitError when the user has too many contexts.
        """
        old = context.user_id
        displaced: Displaced = {}
        if not self._is_in(context, old):
            return displaced
        self._unfold(old)
        self._unfold(user_id)
        self._make_room(user_id, False, displaced)
        group = {context: None}
        if transition():
            self._evict_squatter(user_id, context)
            lifetime = context.lifetime
            self._deadlines[True].discard(lifetime)
            self._queue(context)
            self._rename(context, old, user_id, displaced)
            self._by_owner.pop(old, None)
            if user_id in self._by_owner:
                self._by_owner[user_id][context] = None
            else:
                self._by_owner[user_id] = group
            self._live[True] -= 1
            self._live[False] += 1
            if not context.is_open:  # it was closed in the middle of this, and looked for where it was not yet
                self.remove(context)
        return displaced

    def _rename(self, context: UserExecutionContext, old: str, user_id: str, displaced: Displaced) -> None:
        """Put a context under its owner's new id, in each pair that it stands under."""
        renamed: list[Key] = []
        for key in context.registry_keys:
            if key[0] == old and isinstance(key, tuple):
                self._by_key.pop(key, None)
                key = (user_id, key[1])
                present = self._by_key.get(key)
                if present is not None:
                    displaced[present] = "replaced" if self._is_live(present) else "expired"
                self._by_key[key] = context
            renamed.append(key)
        context.registry_keys = tuple(renamed)

    @_exclusive
    def limit(self, context: UserExecutionContext, seconds: float) -> float | None:
        """Let a context live so many seconds more at most, whatever it is given later.

        Returns its deadline; None for a context that is not in, or not yet: it will be put in with its deadline.
        """
        lifetime = context.lifetime
        lifetime.limit(self.clock() + seconds, self.clock)
        if not self._is_in(context, context.user_id):
            return None
        self._deadlines[context.is_anonymous].discard(lifetime)
        self._queue(context)
        return lifetime.deadline

    @_exclusive
    def live(self) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot: every live context with the first key it stands under."""
        return self._shown(list(self._lone.values()), list(self._by_owner.values()))

    @_exclusive
    def live_of(self, user_ids: Iterable[str]) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot of some users' live contexts."""
        users = list(user_ids)
        lone = [self._lone[user] for user in users if user in self._lone]
        return self._shown(lone, [self._by_owner[user] for user in users if user in self._by_owner])

    def _shown(
        self, lone: list[UserExecutionContext], groups: list[dict[UserExecutionContext, None]]
    ) -> list[tuple[Key, UserExecutionContext]]:
        shown: list[tuple[Key, UserExecutionContext]] = [
            ((context.user_id, context.request_id), context) for context in lone
        ]
        shown += [(context.registry_keys[0], context) for group in groups for context in list(group)]
        return shown

    @_exclusive
    def take_due(self) -> list[UserExecutionContext]:
        """Some contexts whose deadline has come; call again until there are none. They stay in until they close."""
        now = self.clock()
        return [context for deadlines in self._deadlines for context in deadlines.pop_due(now, SLICE)]

    @_exclusive
    def postpone(self, context: UserExecutionContext) -> None:
        """Let ``take_due`` offer a context again, a second from now."""
        if self._is_in(context, context.user_id):
            self._deadlines[context.is_anonymous].add(context.lifetime, context, self.clock(), RETRY)

    @_exclusive
    def next_wake(self) -> float | None:
        """When the next deadline must be looked at, on the registry's clock."""
        wakes = [deadlines.next_wake() for deadlines in self._deadlines]
        return min((wake for wake in wakes if wake is not None), default=None)

    def _is_in(self, context: UserExecutionContext, owner: str) -> bool:
        return self._lone.get(owner) is context or context in self._by_owner.get(owner, ())

    def _make_way(self, context: UserExecutionContext, key: Key) -> Displaced:
        """Who must go so that the context can stand under the key."""
        owner = context.user_id
        displaced: Displaced = {}
        if isinstance(key, tuple) and key[0] != owner:
            raise _foreign_key()
        present = self.lookup(key)
        if present is not None and present is not context:
            if not self._is_live(present):
                displaced[present] = "expired"
            elif present.user_id == owner:
                displaced[present] = "replaced"
            elif key == owner:
                displaced[present] = "evicted"
            else:
                raise _foreign_key()
        if key != owner and isinstance(key, str) and any(self._is_live(other) for _, other in self.live_of([key])):
            raise _foreign_key()
        return displaced

    def _evict_squatter(self, owner: str, context: UserExecutionContext) -> None:
        """A key that equals a user id belongs to that user, whoever stood there before the user came.

        Whoever did loses the key, and lives on under the pair that every context has.
        """
        squatter = self._by_key.get(owner)
        if squatter is None or squatter is context or squatter.user_id == owner:
            return
        del self._by_key[owner]
        pair = (squatter.user_id, squatter.request_id)
        squatter.registry_keys = tuple(key for key in squatter.registry_keys if key != owner) or (pair,)
        self._by_key.setdefault(squatter.registry_keys[0], squatter)

    def _make_room(self, owner: str, anonymous: bool, displaced: Displaced) -> None:
        """Check the limits. Contexts that have expired do not count: they are displaced."""
        limits = self.limits
        mine = self._by_owner.get(owner)
        if not anonymous and mine is not None and len(mine) >= limits.per_user:
            displaced.update((context, "expired") for context in list(mine) if not self._is_live(context))
            if len(mine) - sum(context in mine for context in displaced) >= limits.per_user:
                raise ContextLimitError("user", limits.per_user, "finish or close one of this user's contexts first")
        live, limit = self._live[anonymous], self._most[anonymous]
        if live < limit:
            return
        due = self._deadlines[anonymous].pop_due(self.clock(), SLICE)
        displaced.update((context, "expired") for context in due)  # one is enough to make room
        if live - sum(context.is_anonymous == anonymous for context in displaced) >= limit:
            scope = "anonymous" if anonymous else "total"
            raise ContextLimitError(scope, limit, "the server is at its limit; try again shortly")

    def _is_live(self, context: UserExecutionContext) -> bool:
        lifetime = context.lifetime
        return lifetime.is_open and not lifetime.is_expired

    def _set_deadline(self, context: UserExecutionContext, ttl: float) -> None:
        lifetime = context.lifetime
        now = self.clock()
        anonymous = context.is_anonymous
        self._deadlines[anonymous].discard(lifetime)
        deadline = now + ttl
        allowed = lifetime.expire_at(deadline, self.clock)
        self._deadlines[anonymous].add(lifetime, context, now, ttl if allowed == deadline else allowed - now)

    def _queue(self, context: UserExecutionContext) -> None:
        """Have the sweep look at a context's deadline, whatever set it."""
        deadline = context.lifetime.deadline
        if deadline is not None:
            now = self.clock()
            self._deadlines[context.is_anonymous].add(context.lifetime, context, now, deadline - now)


def _foreign_key() -> CrossUserAccessError:
    return CrossUserAccessError("this key is not yours: choose another, or none")


def _closed(context: UserExecutionContext) -> ContextClosedError:
    lifetime = context.lifetime
    return ContextClosedError(context.request_id, lifetime.where(), lifetime.reason or "closed")
