"""Everything that can happen to contexts, in any order, against a model: ownership, limits, wiping and release.

After every step the manager must show what the model foretells. All of it goes through the public interface.
"""

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from support.clock import Clock
from support.model import INTERRUPTING, Key, Known, Model, Refused
from support.world import ASYNCHRONOUS, KINDS, Fault, Inside, Kind, Thing, World, finished
from ucm_middleware import (
    EVERYONE,
    ContextClosedError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    Principal,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
)
from ucm_middleware.types import Receive, Scope, Send

T = TypeVar("T")
P = ParamSpec("P")

SCALE = 40 if settings.get_current_profile_name() == "soak" else 1

PER_USER, TOTAL, ANONYMOUS = 2, 4, 2
USERS = ("alice", "bob", "carol")
# A text may be a user's id; a request id may be one too; and pairs may be spelt as text.
TEXTS = (*USERS, "desk", "('alice', 'desk')", "alice:desk")
KEYS: tuple[Key, ...] = (*TEXTS, ("alice", "desk"), ("bob", "desk"), ("alice", "bob"), ("bob", "alice"))
TTLS = (None, 1.0, 5.0, 60.0)
YEAR = 365 * 24 * 3600.0
SOONEST = 0.0011
"""Seconds that a sweep may be late: its resolution, and what floats lose. Whoever looks sees a deadline exactly."""

STATUS = {"revoked": 401, "expired": 504, "shutdown": 503}
GIVEN: dict[str, Any] = {"shared": [], "deep": {"list": []}}
"""The same to all: what is put into one context's copy must be seen in no other."""


class Own(Enum):
    """Keys that depend on whose context it is about."""

    ID = "the owner's id"
    DESK = "the pair of the owner and a text"
    PAIR = "the pair that every context has"
    ABSENT = "the id of a user who has no context"


users = st.sampled_from(USERS)
keys = st.sampled_from([*KEYS, *Own, Own.ID, Own.ABSENT, Own.ABSENT])
ttls = st.sampled_from(TTLS)
SQUATTED = "the user under whose id another's context stands"
whose = st.sampled_from([None, SQUATTED, SQUATTED, *USERS])
"""None for the user that the asking code runs for."""

numbers = st.integers(0, 11)
askers = st.one_of(st.none(), numbers)
"""Trusted code outside, or some context that code runs in."""


def on_loop(
    step: "Callable[Concatenate[ContextMachine, P], Coroutine[Any, Any, None]]",
) -> "Callable[Concatenate[ContextMachine, P], None]":
    """A step that runs on the machine's loop, until nothing happens any more."""

    @functools.wraps(step)
    def run(machine: "ContextMachine", /, *args: P.args, **kwargs: P.kwargs) -> None:
        machine.broken = True
        machine.world.run(step(machine, *args, **kwargs))
        machine.model.notice_expired()
        machine.see_who_was_interrupted()

    return run


class ContextMachine(RuleBasedStateMachine):
    """One manager behind a middleware, and everybody who uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.model = Model(PER_USER, TOTAL, ANONYMOUS)
        self.clock = Clock()
        self.model.now = self.clock()
        self.broken = True  # from each step on until everything was found as foretold
        self.denials: dict[str, set[str]] = {}
        self.checked: set[Known] = set()

    @initialize(
        guard=st.sampled_from(["closed", "open"]),
        callers=st.lists(st.tuples(st.sampled_from([None, *USERS]), ttls), max_size=5),
    )
    @on_loop
    async def begin(self, guard: Any, callers: list[tuple[str | None, float | None]]) -> None:
        self.guard = guard
        self.manager = UserContextManager(
            max_contexts_per_user=PER_USER,
            max_connections_per_user=PER_USER,
            max_contexts=TOTAL,
            max_anonymous_contexts=ANONYMOUS,
            guard=guard,
            clock=self.clock,
        )
        self.apps = {
            ttl: UserContextMiddleware(_stay, manager=self.manager, identify=_claimed, ttl=ttl) for ttl in TTLS
        }
        for user, ttl in callers:
            await self.call(user, False, ttl)

    def teardown(self) -> None:
        try:
            if not self.broken:
                self.drain()
        finally:
            self.world.close()

    # Where code runs.

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Code in nobody's context, that says what it is for where it has to."""
        if self.guard == "open":
            yield
        else:
            with self.manager.privileged(reason="a test", users=EVERYONE):
                yield

    async def ask(self, asker: Known | None, work: Callable[[], Awaitable[T] | T]) -> T:
        """Do something inside of a context, or outside of any."""
        if asker is not None:
            assert asker.inside is not None
            return await asker.inside.do(work)

        async def trusted() -> T:
            with self.outside():
                return await finished(work())

        return await self.world.outcome(trusted())

    async def refused(self, refusal: Refused, asker: Known | None, work: Callable[[], Awaitable[T] | T]) -> None:
        """The same, for what must be refused."""
        with pytest.raises(refusal.kind) as caught:
            await self.ask(asker, work)
        assert type(caught.value) is refusal.kind
        if isinstance(caught.value, ContextLimitError):
            assert caught.value.scope == refusal.scope
        if isinstance(caught.value, CrossUserAccessError) and asker is not None:
            # The same for foreign and for missing, but for the name of the method.
            action, _, text = str(caught.value).partition(": ")
            self.denials.setdefault(text, set()).add(action)
            assert not any(user in str(caught.value) for user in USERS)

    async def try_it(
        self, asker: Known | None, foretold: Callable[[], object], work: Callable[[], Awaitable[T] | T]
    ) -> T | None:
        """Have the model foretell it, then do it. None when it was refused, as foretold."""
        self.model.notice_expired()
        try:
            foretold()
        except Refused as refusal:
            await self.refused(refusal, asker, work)
            return None
        return await self.ask(asker, work)

    def see_who_was_interrupted(self) -> None:
        """A handler ends of itself only when its context was cut off, and is answered by the table."""
        for known in self.model.all:
            inside = known.inside
            if inside is None or inside.task is None or not inside.task.done():
                continue
            known.inside = None
            assert known.phase == "closed"
            assert known.reason in INTERRUPTING
            if inside.is_block:
                assert isinstance(inside.task.exception(), ContextClosedError)
            elif not known.context.websocket_client_id:
                assert status_of(inside.task.result()) == STATUS[known.reason]

    # Which context is meant.

    def pick(self, number: int, **wanted: bool) -> Known | None:
        """Some context that is not closed and fits: roots only, anonymous, with code inside."""
        fitting = [
            known
            for known in self.model.all
            if (known.phase != "closed" or wanted.get("inside"))
            and wanted.get("anonymous", known.anonymous) == known.anonymous
            and (not wanted.get("root") or known.parent is None)
            and (not wanted.get("inside") or known.inside is not None)
        ]
        return fitting[number % len(fitting)] if fitting else None

    def user(self, user: str | None, asker: Known | None) -> str:
        """The user meant, spelt out; some user where there is none such."""
        if user == SQUATTED:
            taken = [str(key) for known in self.model.live() for key in known.keys if key in USERS]
            return next((user for user in taken if not self.model.live(user)), USERS[0])
        return user or (USERS[0] if asker is None or asker.anonymous else asker.owner)

    def asker(self, number: int | None) -> Known | None:
        return None if number is None else self.pick(number, inside=True)

    def know(
        self, context: UserExecutionContext, given: dict[str, Any] | None = None, parent: Known | None = None
    ) -> Known:
        """Take up a new context, and leave something in it."""
        known = Known(context, context.user_id, context.is_anonymous, parent=parent)
        known.taken = context.agent_context
        known.taken.setdefault("secret", f"the secret of {len(self.model.all)}")
        known.data = deepcopy({**(given or {}), "secret": known.taken["secret"]})
        self.model.all.append(known)
        return known

    def named(self, key: Key | Own, known: Known | None) -> Key:
        """The key, spelt out for a context; some text for none."""
        if not isinstance(key, Own):
            return key
        absent = [user for user in USERS if not self.model.live(user)]
        if known is None or key is Own.ABSENT:
            return absent[0] if absent else "desk"
        pairs = {Own.DESK: (known.owner, "desk"), Own.PAIR: (known.owner, known.context.request_id)}
        return pairs.get(key, known.owner)

    # Opening.

    @rule(user=st.one_of(st.none(), users), websocket=st.booleans(), ttl=ttls)
    @on_loop
    async def a_request_comes(self, user: str | None, websocket: bool, ttl: float | None) -> None:
        await self.call(user, websocket, ttl)

    async def call(self, user: str | None, websocket: bool, ttl: float | None) -> None:
        inside = Inside(self.world)
        more: dict[str, Any] = {"inside": inside, "claimed": user, "state": {}, "extensions": DENIAL}
        scope = (websocket_scope if websocket else http_scope)(**more)
        inside.task = asyncio.create_task(exchange(self.apps[ttl], scope))
        await self.world.settle()
        try:
            self.model.notice_expired()
            self.model.require_room(user or "", user is None, {})
        except Refused:
            assert inside.context is None
            assert status_of(await inside.task) == 429
            return
        assert inside.context is not None, inside.task.result()
        assert inside.context.is_anonymous == (user is None)
        known = self.know(inside.context)
        known.inside = inside
        self.model.put(None, known, (known.owner, inside.context.request_id), ttl)

    @rule(
        number=askers,
        user=whose,
        request_id=st.sampled_from([None, None, "desk", "bob", "alice"]),
        ttl=ttls,
        managed=st.booleans(),
        session=st.booleans(),
    )
    @on_loop
    async def one_is_created(
        self,
        number: int | None,
        user: str | None,
        request_id: str | None,
        ttl: float | None,
        managed: bool,
        session: bool,
    ) -> None:
        asker = self.asker(number)
        user = self.user(user, asker)
        create = self.manager.create_managed_context if managed else self.manager.create_isolated_context
        blank = create_isolated_execution_context(user, request_id)  # stands for the one that comes, or does not
        thing = Thing(self.world, blank, "close", "none")
        known = Known(blank, user)
        db_session = _Session(thing) if session else None
        made = await self.try_it(
            asker,
            lambda: self.model.put(asker, known, (user, blank.request_id), 3600.0 if managed and ttl is None else ttl),
            lambda: create(user, request_id, ttl_seconds=ttl, agent_context=GIVEN, db_session=db_session),
        )
        if made is None:
            return
        assert made.user_id == user
        assert made.db_session is db_session
        known.keys = [(user, made.request_id) if key == (user, blank.request_id) else key for key in known.keys]
        self.adopt(known, made)
        thing.context = made
        if session:
            known.things.append(thing)

    def adopt(self, known: Known, context: UserExecutionContext) -> None:
        fresh = self.know(context, GIVEN)
        self.model.all[-1] = known
        known.context, known.data, known.taken = context, fresh.data, fresh.taken

    @rule(number=askers, user=whose, key=keys, ttl=ttls, kind=st.sampled_from([None, *KINDS]))
    @on_loop
    async def one_made_by_hand_is_put_under_a_key(
        self, number: int | None, user: str | None, key: Key | Own, ttl: float | None, kind: Kind | None
    ) -> None:
        asker = self.asker(number)
        await self.put(asker, self.user(user, asker), key, ttl, kind)

    async def put(
        self, asker: Known | None, user: str, key: Key | Own, ttl: float | None = None, kind: Kind | None = None
    ) -> None:
        context = create_isolated_execution_context(user, agent_context=GIVEN)
        known = self.know(context, GIVEN)
        under = self.named(key, known)
        if kind is not None:
            await self.enter(known, kind, "none")
        await self.try_it(
            asker,
            lambda: self.model.put(asker, known, under, ttl),
            lambda: self.manager.set_context(under, context, ttl_seconds=ttl),
        )
        if known not in self.model.registered:  # refused: it is the caller's, as it was
            assert context.agent_context == known.data
            await self.world.outcome(context.aclose())
            self.model.close(known, "closed")
            self.checked.add(known)
            with self.outside():
                trail = self.manager.get_audit_trail(known.owner)
            assert trail is None or not any(_is_of(event, known) for event in trail["events"])

    @rule(user=users, then=st.sampled_from(["stays", "by hand", "a request", "a binding"]))
    @on_loop
    async def someone_squats(self, user: str, then: str) -> None:
        """Trusted code puts a context under the id of another user, who comes, or not yet."""
        owner = self.named(Own.ABSENT, None)
        guest = str(owner) if owner in USERS else user
        await self.put(None, user, owner)
        if then == "by hand":
            await self.put(None, guest, Own.ID)
        elif then == "a request":
            await self.call(guest, False, None)
        elif then == "a binding" and (known := self.pick(0, anonymous=True, root=True)) is not None:
            await self.bind(known, guest, None, False)

    @rule(number=askers, which=numbers, key=keys, ttl=ttls)
    @on_loop
    async def one_is_put_under_another_key(
        self, number: int | None, which: int, key: Key | Own, ttl: float | None
    ) -> None:
        known = self.pick(which, root=True)
        if known is None:
            return
        asker = self.asker(number)
        under = self.named(key, known)
        await self.try_it(
            asker,
            lambda: self.model.put(asker, known, under, ttl),
            lambda: self.manager.set_context(under, known.context, ttl_seconds=ttl),
        )

    # Binding.

    @rule(which=numbers, user=users, inside=st.booleans(), ends=st.booleans())
    @on_loop
    async def one_is_bound(self, which: int, user: str, inside: bool, ends: bool) -> None:
        known = self.pick(which, anonymous=True, root=True) or self.pick(which, root=True)
        if known is None:
            return
        await self.bind(known, user, known if inside and known.inside is not None else None, ends)

    async def bind(self, known: Known, user: str, asker: Known | None, ends: bool) -> None:
        # Credentials that last longer than any context may: what is left of them is a year exactly.
        who = Principal(user, datetime.now(UTC) + timedelta(days=1000)) if ends else user
        seconds = YEAR if ends else None
        await self.try_it(asker, lambda: self.model.bind(known, user, seconds, asker), lambda: known.context.bind(who))
        assert known.context.user_id == known.owner
        assert known.context.is_anonymous == known.anonymous

    # Finding.

    @rule(number=askers, which=numbers, key=keys)
    @on_loop
    async def someone_asks_for_a_key(self, number: int | None, which: int, key: Key | Own) -> None:
        await self.get(self.asker(number), self.named(key, self.pick(which, root=True)))

    async def get(self, asker: Known | None, key: Key) -> None:
        found: list[Known] = []
        context = await self.try_it(
            asker, lambda: found.append(self.model.get(asker, key)), lambda: self.manager.get_context(key)
        )
        assert [known.context for known in found] == ([] if context is None else [context])
        assert asker is None or context is None or context.user_id == asker.owner

    # Using.

    @precondition(lambda self: self.pick(0) is not None)
    @rule(
        which=numbers,
        things=st.lists(
            st.tuples(st.sampled_from(KINDS), st.sampled_from(["none", "none", "fails", "hangs", "looks"])),
            min_size=1,
            max_size=3,
        ),
    )
    @on_loop
    async def resources_are_entered(self, which: int, things: list[tuple[Kind, Fault]]) -> None:
        known = self.pick(which)
        assert known is not None
        for kind, fault in things:
            await self.enter(known, kind, "none" if fault == "hangs" and kind not in ASYNCHRONOUS else fault)

    async def enter(self, known: Known, kind: Kind, fault: Fault) -> Thing:
        if fault == "looks" and (kind == "owned cm" or not self.model.is_usable(known)):
            fault = "none"  # the one exits as the code that entered it, and it is too late for the other
        thing = Thing(self.world, known.context, kind, fault)
        if self.model.is_usable(known):
            await self.world.outcome(thing.enter())
            known.things.append(thing)
        else:
            with pytest.raises(ContextClosedError):
                await self.world.outcome(thing.enter())
            if kind not in ("cm", "async cm", "owned cm"):  # it was open already: it is let go of at once
                assert thing.released == 1
                self.world.releases.remove(thing)
                known.failed_late += fault in ("fails", "hangs")
        return thing

    @precondition(lambda self: self.pick(0) is not None)
    @rule(which=numbers, kind=st.sampled_from([None, *KINDS]))
    @on_loop
    async def a_child_is_opened(self, which: int, kind: Kind | None) -> None:
        parent = self.pick(which)
        assert parent is not None
        if not self.model.is_usable(parent):
            with pytest.raises(ContextClosedError):
                parent.context.create_child_context("search")
            return
        mine = {"mine": len(self.model.all)}
        made = parent.context.create_child_context("search", agent_context=mine)
        child = self.know(made, parent.data | mine, parent)
        parent.children.append(child)
        assert child.owner == parent.owner
        assert child.context.parent_request_id == parent.context.request_id
        if kind is not None:
            await self.enter(child, kind, "none")

    @precondition(lambda self: self.pick(0) is not None)
    @rule(which=numbers)
    @on_loop
    async def something_is_written(self, which: int) -> None:
        known = self.pick(which)
        assert known is not None
        if self.model.is_usable(known):
            note = f"a note of {known.owner}"
            for data in (known.context.agent_context, known.data):
                data["note"] = note
                data.setdefault("shared", []).append(note)

    @rule(which=numbers)
    @on_loop
    async def code_runs_in_one(self, which: int) -> None:
        """A block of ``managed_user_context`` that goes on."""
        free = [known for known in self.model.all if self.model.is_usable(known) and known.inside is None]
        free = [known for known in free if known.parent is None]
        if not free:
            return
        known = free[which % len(free)]
        known.inside = inside = Inside(self.world, is_block=True)

        async def block() -> None:
            with self.outside():
                entering = managed_user_context(known.context)
                async with entering as context:
                    await inside.stay(context)

        inside.task = asyncio.create_task(block())
        await self.world.settle()
        assert inside.context is known.context

    # The end.

    @precondition(lambda self: self.pick(0, inside=True) is not None)
    @rule(
        which=numbers,
        how=st.sampled_from(["returns", "raises", "cancelled", "cancelled twice", "cancelled late"]),
        kind=st.sampled_from(sorted(ASYNCHRONOUS)),
        times=st.integers(1, 3),
    )
    @on_loop
    async def a_handler_ends(self, which: int, how: str, kind: Kind, times: int) -> None:
        known = self.pick(which, inside=True)
        assert known is not None
        if how != "cancelled late":
            await self.end(known, how)
        elif self.model.is_usable(known):
            await self.enter(known, kind, "none")
            await self.end_and_cancel(known, times)

    async def end(self, known: Known, how: str) -> None:
        inside = known.inside
        assert inside is not None
        assert inside.task is not None
        if how.startswith("cancelled"):
            inside.task.cancel()
            if how.endswith("twice"):
                inside.task.cancel()
        else:
            inside.end(ValueError("a fault of the app") if how == "raises" else None)
        await self.world.settle()
        reason = {"returns": "finished", "raises": "failed"}.get(how, "cancelled")
        known.inside = None
        if known.phase == "closing":
            self.model.tear_down(known, failed=reason != "finished")
        else:
            self.model.close(known, reason)
        assert inside.task.done()
        error = None if inside.task.cancelled() else inside.task.exception()
        assert inside.task.cancelled() == (reason == "cancelled")
        if error is not None:
            assert isinstance(error, ValueError) if how == "raises" else isinstance(error, ExceptionGroup)

    async def end_and_cancel(self, known: Known, times: int) -> None:
        """The handler returns, and its task is cancelled while the context lets go of what it holds."""
        inside = known.inside
        assert inside is not None
        assert inside.task is not None
        self.world.gate.clear()
        inside.end()
        await self.world.settle()
        assert not known.context.is_open
        for _ in range(times):
            inside.task.cancel()
            await self.world.settle()
            assert not inside.task.done()
        self.world.gate.set()
        await self.world.settle()
        assert inside.task.cancelled()
        known.inside = None
        self.model.close(known, "finished")

    @rule(number=askers, which=numbers, key=keys, waits=st.booleans(), everything=st.integers(0, 9))
    @on_loop
    async def a_key_is_cleared(
        self, number: int | None, which: int, key: Key | Own, waits: bool, everything: int
    ) -> None:
        if everything == 9:  # seldom: it leaves little to look at
            await self.clear_everything()
        else:
            await self.clear(self.asker(number), self.named(key, self.pick(which, root=True)), waits)

    async def clear(self, asker: Known | None, key: Key, waits: bool) -> None:
        found: list[Known] = []

        def foretold() -> None:
            try:
                found.append(self.model.get(asker, key))
            except Refused as refusal:
                if not issubclass(refusal.kind, ContextNotFoundError):
                    raise

        def work() -> bool | Awaitable[bool]:
            return self.manager.cleanup_context(key) if waits else self.manager.clear_context(key)

        handler_stays = False
        self.model.notice_expired()
        if waits:
            try:
                known = self.model.get(asker, key)
                handler_stays = known.inside is not None and (asker is None or known not in asker.ancestors())
            except Refused:
                pass
        if handler_stays:  # it would wait for the handler
            waits = False
        cleared = await self.try_it(asker, foretold, work)
        assert cleared in (None, bool(found))
        if found:
            self.model.close(found[0], "cleared", asker)

    @precondition(lambda self: self.pick(0) is not None)
    @rule(which=numbers, reason=st.sampled_from(["closed", "revoked"]), number=askers)
    @on_loop
    async def one_is_closed(self, which: int, reason: Any, number: int | None) -> None:
        known = self.pick(which)
        assert known is not None
        asker = self.asker(number)
        if asker is not None and not self.model.is_usable(asker):
            asker = None
        inside = known.inside
        await self.ask(asker, lambda: known.context.close(reason))
        was_live = known.phase == "live"
        self.model.close(known, reason, asker)
        if was_live and reason in INTERRUPTING and known is not asker and inside is not None:
            assert inside.task is not None
            assert inside.task.done()

    async def clear_everything(self) -> None:
        self.model.notice_expired()
        there = self.model.registered.copy()
        assert await self.ask(None, self.manager.cleanup_all_contexts) == len(there)
        for known in there:
            self.model.close(known, "cleared")

    # Time.

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 5.0, 59.0]), swept=st.sampled_from([False, False, True]))
    @on_loop
    async def time_passes(self, seconds: float, swept: bool) -> None:
        self.advance(seconds)
        if swept:
            await self.sweep()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now = self.clock()

    @precondition(lambda self: any(known.deadline is not None for known in self.model.live()))
    @rule(which=numbers)
    @on_loop
    async def one_reaches_its_deadline(self, which: int) -> None:
        waiting = [known for known in self.model.live() if known.deadline is not None]
        known = waiting[which % len(waiting)]
        assert known.deadline is not None
        tiny = 0.001
        if self.model.now < known.deadline - tiny:
            self.advance(known.deadline - tiny - self.model.now)
            await self.ask(None, self.manager.sweep)
            self.model.notice_expired()
            await self.get(None, known.keys[0])
            assert known.context.is_open
        self.advance(known.deadline - self.model.now)
        await self.get(None, known.keys[0])

    async def sweep(self) -> None:
        self.model.notice_expired()
        before = self.model.registered.copy()
        closed = self.manager.sweep()
        await self.world.settle()
        self.model.notice_expired()
        assert closed == len(before) - len(self.model.registered)
        for known in self.model.registered:
            assert known.deadline is None or known.deadline > self.model.now - SOONEST

    # What must be refused.

    @precondition(lambda self: self.guard == "closed")
    @rule(key=st.sampled_from(KEYS), user=users)
    @on_loop
    async def untrusted_code_outside_is_refused(self, key: Key, user: str) -> None:
        manager = self.manager
        calls: list[Callable[[], object]] = [
            lambda: manager.get_context(key),
            lambda: manager.clear_context(key),
            lambda: manager.create_isolated_context(user),
            lambda: manager.set_context(key, create_isolated_execution_context(user)),
            lambda: manager.get_audit_trail(user),
            manager.get_active_contexts,
            manager.cleanup_all_contexts,
            manager.validate_isolation,
        ]
        for call in calls:
            with pytest.raises(CrossUserAccessError):
                call()

    @rule(which=numbers)
    @on_loop
    async def a_closed_one_is_used(self, which: int) -> None:
        closed = [known for known in self.model.all if not self.model.is_usable(known)]
        if not closed:
            return
        known = closed[which % len(closed)]
        context = known.context
        calls: list[Callable[[], object]] = [
            lambda: context.agent_context,
            lambda: context.audit_metadata,
            lambda: context.db_session,
            lambda: context.environment,
            lambda: context.bind("alice"),
            lambda: context.create_child_context("search"),
            lambda: context.enter_context(Thing(self.world, context, "cm", "none")),
            lambda: self.manager.set_context(context.user_id, context),
        ]
        with self.outside():
            for call in calls:
                with pytest.raises(ContextClosedError):
                    call()
        context.close("revoked")
        self.model.close(known, "revoked")
        assert known.owner in repr(context)

    # What holds after every step.

    @invariant()
    def everything_is_as_foretold(self) -> None:
        self.broken = True
        self.what_is_there_is_what_is_foretold()
        self.code_inside_sees_its_user_only()
        self.who_is_open_has_its_data_and_who_is_not_has_none()
        self.what_was_entered_is_released_once_and_in_order()
        self.each_end_is_on_record_once()
        self.broken = False

    def what_is_there_is_what_is_foretold(self) -> None:
        self.model.notice_expired()
        with self.outside():
            shown = self.manager.get_active_contexts()
            assert sorted((view["user_id"], view["request_id"]) for view in shown.values()) == _ids(self.model.live())
            for key, view in shown.items():
                found = self.manager.get_context(key)
                assert (found.user_id, found.request_id) == (view["user_id"], view["request_id"])
            for known in self.model.live():
                for key in known.keys:
                    assert self.manager.get_context(key) is known.context
        live = self.model.live()
        assert all(len(self.model.live(user)) <= PER_USER for user in USERS)
        assert sum(known.anonymous for known in live) <= ANONYMOUS
        assert len(live) - sum(known.anonymous for known in live) <= TOTAL

    def code_inside_sees_its_user_only(self) -> None:
        for known in self.model.all:
            if known.inside is None or known.phase == "closed":
                continue
            variables = known.inside.variables
            if not self.model.is_usable(known):
                with pytest.raises(ContextClosedError):
                    variables.run(self.manager.get_active_contexts)
                continue
            shown = variables.run(self.manager.get_active_contexts)
            assert sorted((view["user_id"], view["request_id"]) for view in shown.values()) == _ids(
                self.model.live(known.owner)
            )
            assert variables.run(current_context) is known.context

    def who_is_open_has_its_data_and_who_is_not_has_none(self) -> None:
        for known in self.model.all:
            if self.model.is_usable(known):
                assert known.context.is_open
                assert known.context.agent_context == known.data
            else:
                with pytest.raises(ContextClosedError):
                    _ = known.context.agent_context
            if known.phase == "closed":
                assert not known.context.is_open
                assert known.taken == {}
                assert "closed>" in repr(known.context)
                known.data = {}

    def what_was_entered_is_released_once_and_in_order(self) -> None:
        assert self.world.surprises == []
        place = {thing: index for index, thing in enumerate(self.world.releases)}
        assert len(place) == len(self.world.releases)  # none twice
        for known in self.model.all:
            released = [place.get(thing, math.inf) for thing in known.things]
            if known.phase != "closed":
                assert all(thing.released == 0 for thing in known.things)
                continue
            assert all(thing.released == 1 for thing in known.things)
            assert released == sorted(released, reverse=True)
            if known.parent is not None and known.parent.phase == "closed" and known.things:
                assert max(released) < min((place[thing] for thing in known.parent.things), default=math.inf) or (
                    known.reason != known.parent.reason
                )
            for thing in known.things:
                assert not thing.sees_errors or (thing.seen is not None) == known.saw_error

    def each_end_is_on_record_once(self) -> None:
        for known in self.model.all:
            if known.phase == "closed" and known not in self.checked:
                self.checked.add(known)
                self.check_record(known)

    def check_record(self, known: Known) -> None:
        with self.outside():
            trail = self.manager.get_audit_trail(known.owner)
        assert trail is not None
        assert trail["user_id"] == known.owner
        assert trail["events_dropped"] == 0
        ends = [event for event in trail["events"] if event["event"] == "closed" and _is_of(event, known)]
        assert [event["reason"] for event in ends] == [known.reason]
        begins = [
            event for event in trail["events"] if event["event"] in ("opened", "child_opened") and _is_of(event, known)
        ]
        assert begins
        failed = [thing for thing in known.things if thing.fault in ("fails", "hangs")]
        assert len(ends[0].get("unreleased", [])) == len(failed) + known.failed_late

    # The last step.

    def drain(self) -> None:
        self.shut_down()
        self.everything_is_as_foretold()
        self.no_trail_names_another_user()
        self.advance(2 * YEAR)
        assert self.manager.sweep() == 0, "the deadline of one that has closed must be forgotten"
        assert len(self.denials) <= 1, "foreign and missing must look the same"

    @on_loop
    async def shut_down(self) -> None:
        self.model.notice_expired()
        there = self.model.registered.copy()
        waiting = [known for known in self.model.all if known.phase == "closing"]
        draining = asyncio.ensure_future(self.manager.drain(0.0))
        await self.world.settle()
        for known in there:
            self.model.close(known, "shutdown")
        self.see_who_was_interrupted()
        for known in self.model.all:  # their contexts were closed before, and they went on
            if known.inside is not None:
                assert known in waiting or known.phase == "closed" or known not in there
                await self.end(known, "returns")
        await self.world.settle()
        assert draining.result() == len(there)
        assert not self.manager.is_healthy()
        for known in self.model.all:  # those that no manager knows
            if known.phase == "live":
                known.context.close()
                self.model.close(known, "closed")
                self.checked.add(known)

    def no_trail_names_another_user(self) -> None:
        for user in USERS:
            with self.outside():
                trail = self.manager.get_audit_trail(user)
            for event in () if trail is None else trail["events"]:
                said = {
                    name: value
                    for name, value in event.items()
                    if name not in ("request_id", "parent_request_id", "asked_for", "asked_for_request")
                }
                others = [other for other in USERS if other != user]
                assert not any(other in repr(said) for other in others)
                assert "secret" not in repr(said)


class _Session:
    def __init__(self, thing: Thing) -> None:
        self.close = thing.let_go


async def _stay(scope: Scope, receive: Receive, send: Send) -> None:
    """The app."""
    inside: Inside = scope["inside"]
    await inside.stay(scope["state"]["user_context"])
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204, "headers": []})


def _claimed(connection: Any) -> str | None:
    claimed: str | None = connection.scope["claimed"]
    return claimed


def _ids(contexts: list[Known]) -> list[tuple[str, str]]:
    return sorted((known.owner, known.context.request_id) for known in contexts)


def _is_of(event: dict[str, Any], known: Known) -> bool:
    return bool(event.get("request_id") == known.context.request_id and event.get("run_id") == known.context.run_id)


pytestmark = pytest.mark.no_cover  # see pyproject.toml

# Some of what it enters does not let go in time.
TestContexts = pytest.mark.ucm_leaks("some resources never let go")(ContextMachine.TestCase)
TestContexts.settings = settings(
    max_examples=200 * SCALE,
    stateful_step_count=40,
    derandomize=SCALE == 1,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
