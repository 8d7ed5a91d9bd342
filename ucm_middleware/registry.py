"""The table of live contexts: under which keys, whose they are, how many, and until when."""

# pyright: reportPrivateUsage=false
# Each request comes through here twice: the fields of the context are read where they are.

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextClosedError, ContextLimitError, CrossUserAccessError
from ucm_middleware.expiry import front
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.lifetime import OPEN, UNBOUND, WEBSOCKET, CloseReason, Lifetime
from ucm_middleware.population import Place, Population

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
    """How many live root contexts there may be: of one user, of all named users, and of anonymous ones; and how many of
    one user's may be WebSocket connections.
    """

    __slots__ = ("anonymous", "connections", "per_user", "total")

    def __init__(self, per_user: int, total: int, anonymous: int, connections: int) -> None:
        self.per_user = per_user
        self.total = total
        self.anonymous = anonymous
        self.connections = connections


@dataclass(slots=True)
class Change:
    """What is to be written about one context, as it was decided on one version of the table.

    It has every object that the writing takes: ``group`` is for the owner's first context, ``place`` for a deadline
    that must be queued.
    """

    version: int
    context: UserExecutionContext
    owner: str
    population: Population
    keys: tuple[Key, ...]
    names: dict[Key, UserExecutionContext]
    group: dict[UserExecutionContext, None]
    place: Place | None


def _exclusive(
    method: Callable[Concatenate["Registry", P], T],
) -> Callable[Concatenate["Registry", P], T]:
    """Run a method under the registry's lock, and let it be seen that somebody does.

    Under the GIL, threads, finalizers and signal handlers come in between calls only. So a few lines that call nothing
    are atomic by themselves: where they find ``_held`` at 0, no operation under the lock is in its middle, and they
    need not take it. A debugger that traces lines is a call at each of them: under one, threads may meet there.
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

    Most contexts stand alone: see ``Population``. Whatever is more than that, a second context of an owner, another
    key, a deadline of its own, unfolds the entry into the tables of keys and of owners, and a queue of deadlines.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.clock = clock
        self._start_empty()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the contexts, and the connections they hold, are the parent's."""
        tables = [*(population.lone.values() for population in self._populations), *self._by_owner.values()]
        for context in [context for table in tables for context in table]:
            context.leave_to_parent()
        self._start_empty()

    def _start_empty(self) -> None:
        # The lock is reentrant: a finalizer or a signal handler may open or close a context in the middle of an
        # operation. So what is walked is a snapshot, and what was checked before a call is checked again after it: only
        # between calls can nothing happen. What takes many calls is decided first, and then written at once, if the
        # version is still the one that it was decided on. Removing does not change it: that only makes room.
        self._lock = threading.RLock()
        self._held = 0
        self._version = 0
        self._by_key: dict[Key, UserExecutionContext] = {}
        self._by_owner: dict[str, dict[UserExecutionContext, None]] = {}
        self._named = Population(self.limits.total)
        self._anonymous = Population(self.limits.anonymous)
        self._populations = (self._named, self._anonymous)

    def __len__(self) -> int:
        return self._named.live + self._anonymous.live

    def lookup(self, key: Key) -> UserExecutionContext | None:
        """The context under a key, expired or not."""
        if isinstance(key, str):
            own = self._named.lone.get(key)
            if own is not None and own.registry_keys:
                return own
        else:
            owner, request_id = key
            context = self._named.lone.get(owner)
            if context is None:
                context = self._anonymous.lone.get(owner)
            if context is not None and not context.registry_keys:
                same = context._request_id == request_id or context.request_id == request_id  # it may be text only now
                if same:
                    return context
        return self._by_key.get(key)  # second: one that was unfolded in between is here by now

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
        if key == context._user_id and also is None and not context._anonymous:
            return self.admit(context, ttl, usual_ttl, (key,)) or {}
        return self._insert(context, key, ttl, usual_ttl, also)

    def admit(
        self,
        context: UserExecutionContext,
        ttl: float | None,
        usual_ttl: float | None = None,
        keys: tuple[Key, ...] = (),
    ) -> Displaced | None:
        """The same under the pair of its user and its request, or under its user's id if ``keys`` has it.

        A new context, which is nearly always alone, needs no lock here: that would cost more than all the rest. None
        when nothing must be closed.
        """
        clock = self.clock
        life = usual_ttl if ttl is None else ttl
        deadline = None if life is None else clock() + life
        # From here to the table nothing is called; see _exclusive.
        owner = context._user_id
        lifetime = context._lifetime
        population = self._anonymous if context._anonymous else self._named
        lone = population.lone
        if (
            self._held == 0
            and owner not in lone
            and (not self._by_owner or (owner not in self._by_owner and owner not in self._by_key))  # by_key: squatters
            and (life == population.ttl or not lone)
            and lifetime.deadline is None  # else a plugin has bound it to credentials that end
            and (lifetime.state is OPEN or lifetime.state is UNBOUND)  # from now on, who closes it finds it here
            and population.room > 0
        ):
            lifetime._clock = clock
            lifetime.deadline = deadline
            population.ttl = life
            context.registry_keys = keys
            lone[owner] = context
            population.room -= 1
            return None
        return self._insert(context, keys[0] if keys else (owner, context.request_id), ttl, usual_ttl, None)

    @_exclusive
    def _insert(
        self, context: UserExecutionContext, key: Key, ttl: float | None, usual_ttl: float | None, also: Key | None
    ) -> Displaced:
        if not context._lifetime.is_open:  # whoever closed it has looked for it here already, or waits for the lock
            raise _closed(context)
        displaced: Displaced = {}
        while not self._write(change := self._decide(context, key, ttl, usual_ttl, also, displaced)):
            _keep_expired(displaced)
        self._evict_squatter(change.owner, context)
        return displaced

    def _decide(
        self,
        context: UserExecutionContext,
        key: Key,
        ttl: float | None,
        usual_ttl: float | None,
        also: Key | None,
        displaced: Displaced,
    ) -> Change:
        """What an insertion writes, and whom it displaces."""
        version = self._version
        owner = context.user_id
        population = self._population_of(context)
        lifetime = context._lifetime
        names = {key: context}
        displaced.update(self._make_way(context, key))
        if also is not None:
            names[also] = context
            displaced.update(self._make_way(context, also))
        keys: tuple[Key, ...] = ()
        is_new = not self._unfold(context)
        if is_new:
            ttl = usual_ttl if ttl is None else ttl
            if ttl != population.ttl:  # sooner or later the table is for those of whom there come more
                for other in front(population.lone, 1):
                    self._unfold_owner(other)
            self._make_room(context, owner, population, displaced)
        else:
            keys = context.registry_keys
        place = None
        if ttl is not None:
            now = self.clock()
            deadline = now + ttl if lifetime._latest is None else min(now + ttl, lifetime._latest)
            place = population.place_for(deadline, now, self.clock)
            place.given = now + ttl
        elif is_new:  # its user's credentials may end
            place = self._place_of(lifetime, population)
        keys = tuple(dict.fromkeys((*keys, *names)))
        return Change(version, context, owner, population, keys, names, {context: None}, place)

    def _write(self, change: Change) -> bool:
        """Write what was decided. False when the table has changed since, and nothing was written.

        From the first check on there is no call, no loop, and nothing made that the garbage collector counts: so
        nothing comes in between.
        """
        context, owner, group, population = change.context, change.owner, change.group, change.population
        lifetime, place = context._lifetime, change.place
        by_owner, queues = self._by_owner, population.deadlines.queues
        if self._version != change.version:
            return False
        if lifetime.state is not OPEN and lifetime.state is not UNBOUND:
            return True  # whoever closed it has looked for it here already, or waits for the lock
        self._version += 1
        if owner not in by_owner:
            by_owner[owner] = group
            population.room -= 1
        elif context not in by_owner[owner]:
            by_owner[owner][context] = None
            population.room -= 1
        context.registry_keys = change.keys
        self._by_key |= change.names
        if place is not None:
            if lifetime.wait in queues and lifetime in queues[lifetime.wait]:
                del queues[lifetime.wait][lifetime]
            lifetime._clock = place.clock
            lifetime._given = place.given
            lifetime.deadline = place.deadline
            lifetime.wait = place.wait
            lifetime.wake = place.wake
            place.queue[lifetime] = context
        return True

    def _unfold_owner(self, owner: str) -> dict[UserExecutionContext, None] | None:
        """An owner's contexts in the general form."""
        for population in self._populations:
            while owner in population.lone:
                context = population.lone[owner]
                lifetime = context._lifetime
                keys = _keys_of(context)
                group: dict[UserExecutionContext, None] = {context: None}
                place = self._place_of(lifetime, population)
                if place is not None and place.deadline is not None:
                    place.wake = min(place.wake, place.deadline)  # when it is due already
                if owner in population.lone and population.lone[owner] is context:
                    context.registry_keys = keys
                    self._by_key[keys[0]] = context
                    self._by_owner[owner] = group
                    if place is not None:
                        lifetime.wait = place.wait
                        lifetime.wake = place.wake
                        place.queue[lifetime] = context
                    del population.lone[owner]
        return self._by_owner.get(owner)

    def _unfold(self, context: UserExecutionContext) -> bool:
        """Whether a context is in. If so, it is in the general form from now on."""
        mine = self._unfold_owner(context.user_id)
        return mine is not None and context in mine

    def remove(self, context: UserExecutionContext) -> bool:
        """Take a context out, and free its keys. False when it was not in."""
        owner = context._user_id
        population = self._anonymous if context._anonymous else self._named
        lone = population.lone
        if owner in lone and lone[owner] is context:  # without the lock, also while it is held: nothing is called
            del lone[owner]
            population.room += 1
            return True
        return self._remove(context)

    @_exclusive
    def _remove(self, context: UserExecutionContext) -> bool:
        owner = context.user_id  # a late binding may just have changed it, under this lock
        population = self._population_of(context)
        mine = self._by_owner.get(owner, {})
        if owner in population.lone and population.lone[owner] is context:
            del population.lone[owner]
            population.room += 1
            return True
        if context not in mine:
            return False
        del mine[context]
        population.room += 1
        if not mine:
            del self._by_owner[owner]
        for key in context.registry_keys:
            if key in self._by_key and self._by_key[key] is context:
                del self._by_key[key]
        population.deadlines.discard(context._lifetime)
        return True

    @_exclusive
    def rebind(self, context: UserExecutionContext, user_id: str, transition: Callable[[], object]) -> Displaced:
        """Move an anonymous context to its user. ``transition`` does the binding, with the lock held.

        Returns the contexts that must be closed for it. Raises ContextLimitError when the user has too many contexts.
        """
        named = self._named
        displaced: Displaced = {}
        while True:
            version = self._version
            if not self._unfold(context) or not context._anonymous:  # it was closed, or bound, in the middle of this
                return displaced
            old = context._user_id
            self._unfold_owner(user_id)
            self._make_room(context, user_id, named, displaced)
            # The binding calls, and cannot be undone: so there is a place for the context with both, until it is made.
            if self._write(Change(version, context, user_id, named, context.registry_keys, {}, {context: None}, None)):
                break
            _keep_expired(displaced)
        queue = self._anonymous.deadlines.queues.get(context._lifetime.wait, {})
        try:
            transition()
        finally:
            if context._user_id != user_id:
                self._leave(user_id, context, named)
            elif self._leave(old, context, self._anonymous):  # else it was bound to the same user in the middle of this
                queue.pop(context._lifetime, None)  # as a limit that came since has queued it among the named ones
                self._rename(context, old, user_id, displaced)
        return displaced

    def _leave(self, owner: str, context: UserExecutionContext, population: Population) -> bool:
        """Give up a place among an owner's contexts. False when it had none."""
        by_owner = self._by_owner
        if owner not in by_owner or context not in by_owner[owner]:
            return False
        del by_owner[owner][context]
        population.room += 1
        if not by_owner[owner]:
            del by_owner[owner]
        return True

    def _rename(self, context: UserExecutionContext, old: str, user_id: str, displaced: Displaced) -> None:
        """Put a context under its owner's new id, in each pair that it stands under."""
        lifetime = context._lifetime
        self._anonymous.deadlines.discard(lifetime)
        replaced: Displaced = {}
        while True:
            version = self._version
            keys = context.registry_keys
            pairs: dict[Key, Key] = {key: (user_id, key[1]) for key in keys if isinstance(key, tuple) and key[0] == old}
            renamed = tuple(pairs.get(key, key) for key in keys)
            names = dict.fromkeys(pairs.values(), context)
            for key in names:
                present = self._by_key.get(key)
                if present is not None and present is not context:
                    replaced[present] = "replaced" if self._is_live(present) else "expired"
            place = self._place_of(lifetime, self._named)
            if self._write(Change(version, context, user_id, self._named, renamed, names, {context: None}, place)):
                break
            _keep_expired(replaced)
        displaced.update(replaced)
        for key in pairs:
            self._by_key.pop(key, None)
        self._evict_squatter(user_id, context)

    @_exclusive
    def limit(self, context: UserExecutionContext, seconds: float) -> float | None:
        """Let a context live so many seconds more at most, whatever it is given later.

        Returns its deadline; None for a context that is not in, or not yet: it will be put in with its deadline.
        """
        is_in = self._unfold(context)  # first: a deadline brought forward does not fit in the order of the lone ones
        context._lifetime.limit(self.clock() + seconds, self.clock)
        return self._moved(context, is_in)

    @_exclusive
    def renew(self, context: UserExecutionContext, seconds: float | None) -> float | None:
        """The same with credentials that take the place of those before, and may hold longer; None for no end."""
        is_in = self._unfold(context)
        context._lifetime.renew(None if seconds is None else self.clock() + seconds, self.clock)
        return self._moved(context, is_in)

    def _moved(self, context: UserExecutionContext, is_in: bool) -> float | None:
        """Queue a context anew, whose deadline has changed. Returns the deadline, None for one that is not in."""
        lifetime = context._lifetime
        self._version += 1  # who is just putting it in must look at its deadline again
        if is_in and lifetime.deadline is None:
            self._population_of(context).deadlines.discard(lifetime)
        while is_in and not self._write(self._queued(context)):
            pass
        return lifetime.deadline if is_in else None

    @_exclusive
    def live(self) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot: every live context with the first key it stands under."""
        lone = [context for population in self._populations for context in list(population.lone.values())]
        return _shown(lone, list(self._by_owner.values()))

    @_exclusive
    def live_of(self, user_ids: Iterable[str]) -> list[tuple[Key, UserExecutionContext]]:
        """A snapshot of some users' live contexts."""
        users = list(user_ids)
        tables = [population.lone for population in self._populations]
        lone = [table[user] for user in users for table in tables if user in table]
        return _shown(lone, [self._by_owner[user] for user in users if user in self._by_owner])

    @_exclusive
    def take_due(self) -> list[UserExecutionContext]:
        """Some contexts whose deadline has come; call again until there are none. They stay in until they close."""
        now = self.clock()
        return [context for population in self._populations for context in self._pop_due(population, now)]

    def _pop_due(self, population: Population, now: float) -> list[UserExecutionContext]:
        lone = population.lone
        for owner in front(lone, SLICE):
            if owner not in lone:
                continue  # a finalizer has just taken it out
            deadline = lone[owner]._lifetime.deadline
            if deadline is None or deadline > now:
                break
            self._unfold_owner(owner)
        return population.deadlines.pop_due(now, SLICE)

    @_exclusive
    def postpone(self, context: UserExecutionContext) -> None:
        """Let ``take_due`` offer a context again, a second from now."""
        if self._unfold(context):
            self._population_of(context).deadlines.add(context._lifetime, context, self.clock(), RETRY)

    @_exclusive
    def next_wake(self) -> float | None:
        """When the next deadline must be looked at, on the registry's clock."""
        wakes = [population.next_wake() for population in self._populations]
        return min((wake for wake in wakes if wake is not None), default=None)

    def _population_of(self, context: UserExecutionContext) -> Population:
        return self._anonymous if context._anonymous else self._named

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
        while True:
            squatter = self._by_key.get(owner)
            if squatter is None or squatter.user_id == owner or context not in self._by_owner.get(owner, ()):
                return
            keys = squatter.registry_keys
            pair = (squatter.user_id, squatter.request_id)
            left = tuple(key for key in keys if key != owner) or (pair,)
            # From here on nothing is called; see _write.
            if owner in self._by_key and self._by_key[owner] is squatter and squatter.registry_keys is keys:
                self._version += 1
                del self._by_key[owner]
                squatter.registry_keys = left
                if left[0] not in self._by_key:
                    self._by_key[left[0]] = squatter
                return

    def _make_room(
        self, context: UserExecutionContext, owner: str, population: Population, displaced: Displaced
    ) -> None:
        """Check the limits. Contexts that have expired do not count: they are displaced."""
        per_user, limit = self.limits.per_user, population.limit
        mine = self._by_owner.get(owner)
        if population is self._named and mine is not None and _is_connection(context):
            self._make_room_for_connection(context, mine, displaced)
        if population is self._named and mine is not None and len(mine) >= per_user:
            displaced.update((context, "expired") for context in list(mine) if not self._is_live(context))
            if len(mine) - sum(context in mine for context in displaced) >= per_user:
                raise ContextLimitError("user", per_user, "finish or close one of this user's contexts first")
        live = population.live
        if live < limit:
            return
        now = self.clock()
        for context in self._pop_due(population, now):  # one is enough to make room
            displaced[context] = "expired"
            population.deadlines.add(context._lifetime, context, now, RETRY)  # whoever needs the room may be refused
        if live - sum(self._population_of(context) is population for context in displaced) >= limit:
            scope = "total" if population is self._named else "anonymous"
            raise ContextLimitError(scope, limit, "the server is at its limit; try again shortly")

    def _make_room_for_connection(
        self, context: UserExecutionContext, mine: dict[UserExecutionContext, None], displaced: Displaced
    ) -> None:
        most = self.limits.connections
        others = [other for other in list(mine) if other is not context and _is_connection(other)]
        if len(others) < most:
            return
        displaced.update((other, "expired") for other in others if not self._is_live(other))
        if sum(other not in displaced for other in others) >= most:
            raise ContextLimitError("connections", most, "close one of this user's connections first")

    def _is_live(self, context: UserExecutionContext) -> bool:
        lifetime = context._lifetime
        return lifetime.is_open and not lifetime.is_expired

    def _queued(self, context: UserExecutionContext) -> Change:
        """A context where it stands, with the deadline that it has now."""
        version = self._version
        population = self._population_of(context)
        place = self._place_of(context._lifetime, population)
        return Change(version, context, context._user_id, population, context.registry_keys, {}, {context: None}, place)

    def _place_of(self, lifetime: Lifetime, population: Population) -> Place | None:
        """Where the deadline waits that a context has already."""
        deadline = lifetime.deadline
        if deadline is None:
            return None
        place = population.place_for(deadline, self.clock(), lifetime._clock)
        place.given = lifetime._given
        return place


def _keys_of(context: UserExecutionContext) -> tuple[Key, ...]:
    return context.registry_keys or ((context.user_id, context.request_id),)


def _is_connection(context: UserExecutionContext) -> bool:
    return context._lifetime.opened_by == WEBSOCKET


def _shown(
    lone: list[UserExecutionContext], groups: list[dict[UserExecutionContext, None]]
) -> list[tuple[Key, UserExecutionContext]]:
    contexts = [*lone, *(context for group in groups for context in list(group))]
    return [(_keys_of(context)[0], context) for context in contexts]


def _keep_expired(displaced: Displaced) -> None:
    """Before deciding anew: who has expired must go in any case, unless it has gone."""
    for context, reason in list(displaced.items()):
        if reason != "expired" or not context.is_open:
            del displaced[context]


def _foreign_key() -> CrossUserAccessError:
    return CrossUserAccessError("this key is not yours: choose another, or none")


def _closed(context: UserExecutionContext) -> ContextClosedError:
    lifetime = context._lifetime
    return ContextClosedError(context.request_id, lifetime.where(), lifetime.reason or "closed")
