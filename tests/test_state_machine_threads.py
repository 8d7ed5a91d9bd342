"""What can happen to contexts, from several threads at once: limits hold at every look, and every end comes once.

What the threads do is generated, in which order they do it is not: so there is no model, but what must hold in any.
"""

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from support.asgi import exchange, http_scope, status_of
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    ContextLimitError,
    UserContextError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    create_isolated_execution_context,
)
from ucm_middleware.types import Receive, Scope, Send

SCALE = 40 if settings.get_current_profile_name() == "soak" else 1

THREADS = 3
MOMENT = 1e-6
"""Seconds. Long enough to let another thread run, which a sleep of no time at all is not; nothing is waited for."""

PER_USER, TOTAL, ANONYMOUS = 2, 4, 2
USERS = ("alice", "bob", "carol")
KEYS = (*USERS, "desk", ("alice", "desk"), ("bob", "desk"))

Operation = tuple[Any, ...]
"""The name of a method of the crowd, and its arguments."""

users = st.sampled_from(USERS)
maybe = st.sampled_from([None, *USERS])
keys = st.sampled_from(KEYS)
ttls = st.sampled_from([None, None, 1.0, 5.0])
numbers = st.integers(0, 3)


class SharedClock:
    """The same for all threads; moves when one of them says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Released:
    """What was given to a context to be called at its end, and how often it was."""

    context: UserExecutionContext
    times: int = 0

    def __call__(self) -> None:
        self.times += 1

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)

    async def __aexit__(self, *raised: object) -> None:
        await asyncio.sleep(0)
        self.times += 1


class Pace:
    """When a thread begins, and how fast it is: at many or few of its calls inside of the package, others may run.

    So one may do all of its work between any two steps of another.
    """

    def __init__(self, seed: str) -> None:
        self._turns = Random(seed)

    def __enter__(self) -> None:
        self._often = self._turns.choice((0.0, 0.02, 0.1, 0.4))
        for _ in range(self._turns.choice((0, 0, 2, 8, 24))):
            time.sleep(MOMENT)
        sys.setprofile(self._give_way)

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)

    def _give_way(self, frame: FrameType, event: str, arg: object) -> None:
        if frame.f_globals.get("__name__", "").startswith("ucm_middleware") and self._turns.random() < self._often:
            time.sleep(MOMENT)


class Crowd:
    """One manager, and what the threads that use it have in common."""

    def __init__(self) -> None:
        self.clock = SharedClock()
        self.manager = UserContextManager(
            max_contexts_per_user=PER_USER,
            max_connections_per_user=PER_USER,
            max_contexts=TOTAL,
            max_anonymous_contexts=ANONYMOUS,
            guard="open",
            clock=self.clock,
        )
        self.app = UserContextMiddleware(self.handle, manager=self.manager, identify=_claimed)
        self.contexts: list[UserExecutionContext] = []
        self.released: list[Released] = []
        self.faults: list[BaseException] = []
        self.puts_begun = self.puts_done = 0
        self._lock = threading.Lock()
        for user in USERS[:2]:  # something that all of them can close, at once
            self.create(user, None, None)
            self.resource(0)
            self.child(0)

    # What a thread may do.

    def create(self, user: str, request_id: str | None, ttl: float | None) -> None:
        with self.putting():
            self.contexts.append(self.manager.create_isolated_context(user, request_id, ttl_seconds=ttl))

    def put(self, user: str, key: Any, ttl: float | None) -> None:
        context = create_isolated_execution_context(user)
        with self.putting():
            self.manager.set_context(key, context, ttl_seconds=ttl)
            self.contexts.append(context)

    def put_again(self, number: int, key: Any) -> None:
        if (context := self.pick(number)) is not None:
            with self.putting():
                self.manager.set_context(key, context)

    def request(self, user: str | None, bound: str | None, key: Any) -> None:
        """A whole request, on an event loop of this thread."""
        sent = asyncio.run(exchange(self.app, http_scope(claimed=user, bound=bound, key=key)))
        assert status_of(sent) in (204, 401, 403, 409, 429, 504)

    def close(self, number: int, reason: Any) -> None:
        if (context := self.pick(number)) is not None:
            context.close(reason)

    def close_it(self, number: int) -> None:
        self.close(number, "closed")

    def clear(self, key: Any) -> None:
        self.manager.clear_context(key)

    def get(self, key: Any) -> None:
        found = self.manager.get_context(key)
        assert isinstance(key, str) or found.user_id == key[0]

    def child(self, number: int) -> None:
        if (context := self.pick(number)) is not None:
            child = context.create_child_context("search")
            self.contexts.append(child)
            child.callback(self.to_be_released(child))

    def resource(self, number: int) -> None:
        if (context := self.pick(number)) is not None:
            context.callback(self.to_be_released(context))
            context.agent_context["note"] = context.user_id

    def wait(self, seconds: float) -> None:
        with self._lock:  # two at once would turn it back
            self.clock.now += seconds
        self.manager.sweep()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app: what a thread's request does, each as far as it may."""
        context: UserExecutionContext = scope["state"]["user_context"]
        self.contexts.append(context)
        if scope["bound"] is not None:
            with self.putting():
                context.bind(scope["bound"])
        released = Released(context)
        with suppress(UserContextError):
            await context.enter_async_context(released)
            self.released.append(released)
        with suppress(UserContextError):
            assert self.manager.get_context(scope["key"]).user_id == context.user_id
        assert {view["user_id"] for view in self.manager.get_active_contexts().values()} <= {context.user_id}
        child = context.create_child_context("search")
        self.contexts.append(child)
        child.callback(self.to_be_released(child))
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 204, "headers": []})

    # What they share.

    def pick(self, number: int) -> UserExecutionContext | None:
        """Some context, the newest first; one that is open, if there is any."""
        contexts = [context for context in self.contexts.copy() if context.is_open] or self.contexts.copy()
        return contexts[-1 - number % len(contexts)] if contexts else None

    def to_be_released(self, context: UserExecutionContext) -> Released:
        released = Released(context)
        self.released.append(released)
        return released

    @contextmanager
    def putting(self) -> Iterator[None]:
        """What is replaced is closed a moment after what replaces it is there: it is seen once more meanwhile.

        And a listing shows each context as it is when it comes to it: some are bound, and some are closed, meanwhile.
        """
        with self._lock:
            self.puts_begun += 1
        try:
            yield
        finally:
            with self._lock:
                self.puts_done += 1

    def look(self) -> None:
        """What holds whenever anyone looks."""
        done = self.puts_done
        active = list(self.manager.get_active_contexts().values())
        under_way = self.puts_begun - done
        named = Counter(view["user_id"] for view in active if not view["is_anonymous"])
        assert max(named.values(), default=0) <= PER_USER + under_way
        assert named.total() <= TOTAL + under_way
        assert len(active) - named.total() <= ANONYMOUS

    def run(self, rounds: list[tuple[Operation, ...]], seed: int) -> None:
        """In each round, each thread does one thing, all at once."""
        start = threading.Barrier(THREADS)

        def work(thread: int) -> None:
            pace = Pace(f"{seed} {thread}")
            try:
                for operations in rounds:
                    name, *arguments = operations[thread]
                    do: Callable[..., None] = getattr(self, name)
                    start.wait(PATIENCE)
                    with pace, suppress(UserContextError):
                        do(*arguments)
                    self.look()
            except threading.BrokenBarrierError:
                pass  # another one has failed
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                self.faults.append(error)
                start.abort()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        if self.faults:
            raise self.faults[0]

    # What must be so afterwards.

    def check(self) -> None:
        self.manager.cleanup_all_contexts()
        for thread in threading.enumerate():
            if thread.name == "ucm-middleware release":
                thread.join(PATIENCE)
        wait_until(lambda: all("closed>" in repr(context) for context in self.contexts), "all are closed")
        assert self.manager.get_active_contexts() == {}
        assert [released for released in self.released if released.times != 1] == []
        for context in self.contexts:
            trail = self.manager.get_audit_trail(context.user_id)
            assert trail is not None
            assert trail["events_dropped"] == 0
            ends = [event for event in trail["events"] if event["event"] == "closed" and _is_of(event, context)]
            assert len(ends) == 1, context
        self.check_counts()

    def check_counts(self) -> None:
        """There is room for exactly as many as there may be: no slot was lost, and none was won."""
        for user in USERS[:2]:
            for _ in range(PER_USER):
                self.manager.create_isolated_context(user)
            with pytest.raises(ContextLimitError) as caught:
                self.manager.create_isolated_context(user)
            assert caught.value.scope == "user"
        with pytest.raises(ContextLimitError) as caught:
            self.manager.create_isolated_context(USERS[2])
        assert caught.value.scope == "total"
        assert asyncio.run(_visitors(self.manager, ANONYMOUS)) == 204
        assert asyncio.run(_visitors(self.manager, ANONYMOUS + 1)) == 429
        assert self.manager.cleanup_all_contexts() == TOTAL


operations = st.one_of(
    st.tuples(st.just("create"), users, st.sampled_from([None, "desk"]), ttls),
    st.tuples(st.just("put"), users, keys, ttls),
    st.tuples(st.just("put_again"), numbers, keys),
    st.tuples(st.just("request"), maybe, maybe, keys),
    st.tuples(st.just("request"), st.none(), users, keys),
    st.tuples(st.just("close"), numbers, st.sampled_from(["closed", "revoked"])),
    st.tuples(st.just("clear"), keys),
    st.tuples(st.just("get"), keys),
    st.tuples(st.just("child"), numbers),
    st.tuples(st.just("resource"), numbers),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 5.0])),
)

fights = st.tuples(*[st.tuples(st.sampled_from(["close_it", "child", "resource"]), st.just(0))] * THREADS)
"""All of them want something of the newest context."""


pytestmark = [pytest.mark.usefixtures("threads_switch_often"), pytest.mark.no_cover]


# Not shrunk: what fails once in some order of the threads need not fail again.
@settings(max_examples=100 * SCALE, derandomize=SCALE == 1, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.one_of(fights, st.tuples(*[operations] * THREADS)), min_size=3, max_size=10), st.integers(0, 2**16))
def test_from_several_threads_at_once(rounds: list[tuple[Operation, ...]], seed: int) -> None:
    crowd = Crowd()
    crowd.run(rounds, seed)
    crowd.check()


async def _visitors(manager: UserContextManager, how_many: int) -> int:
    """The status of the last of so many anonymous requests, each inside of the one before."""
    statuses: list[int] = []

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["more"]:
            statuses.append(status_of(await exchange(app, http_scope(claimed=None, more=scope["more"] - 1))))
        await send({"type": "http.response.start", "status": 204, "headers": []})

    app = UserContextMiddleware(handle, manager=manager, identify=_claimed)
    statuses.append(status_of(await exchange(app, http_scope(claimed=None, more=how_many - 1))))
    return statuses[0]


def _claimed(connection: Any) -> str | None:
    claimed: str | None = connection.scope["claimed"]
    return claimed


def _is_of(event: dict[str, Any], context: UserExecutionContext) -> bool:
    return bool(event.get("request_id") == context.request_id and event.get("run_id") == context.run_id)
