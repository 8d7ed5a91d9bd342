"""A call reaches the target exactly when the rules say so, in whatever order things happen."""

import threading
from collections.abc import Callable
from contextvars import Context, copy_context

from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware import (
    EVERYONE,
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    managed_user_context,
    revoke_handle,
)

TTL = 10.0


class Target:
    def __init__(self) -> None:
        self.reached = 0

    def call(self) -> None:
        self.reached += 1


def running_in(context: UserExecutionContext) -> Context:
    """The contextvars of code that runs in this context."""
    variables = Context()
    variables.run(managed_user_context(context).__enter__)
    return variables


def in_thread(call: Callable[[], None]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except (ContextClosedError, CrossUserAccessError) as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


WAYS = ("owner", "other of hers", "child", "bob", "granted", "granted another", "thread", "bare thread", "nobody")
STEPS = st.one_of(
    st.tuples(st.sampled_from(WAYS), st.sampled_from(["handle", "method"])),
    st.tuples(st.sampled_from(["revoke", "close", "close child", "expire", "bob revokes"]), st.just("")),
)


@given(steps=st.lists(STEPS, min_size=1, max_size=12))
def test_a_call_reaches_the_target_iff_the_rules_say_so(steps: list[tuple[str, str]]) -> None:
    now = [1000.0]
    manager = UserContextManager(clock=lambda: now[0])
    target = Target()
    alice = create_isolated_execution_context("alice")
    manager.set_context("alice", alice, TTL)
    handle = alice.own(target)
    method = handle.call
    child = alice.create_child_context("a part")
    owner, childs = running_in(alice), running_in(child)
    bob, hers = (running_in(manager.create_isolated_context(user)) for user in ("bob", "alice"))
    manager.serve()

    def granted(users: list[str], call: Callable[[], None]) -> None:
        with manager.privileged(reason="a test", users=users):
            call()

    usable, child_open = True, True
    for action, through in steps:
        if action == "revoke":
            revoke_handle(handle)
            usable = False
        elif action == "close":
            owner.run(alice.close)
            usable = child_open = False
        elif action == "close child":
            childs.run(child.close)
            child_open = False
        elif action == "expire":
            now[0] += TTL
            usable = False
        elif action == "bob revokes":
            try:
                bob.run(revoke_handle, handle)
            except CrossUserAccessError:
                pass
            else:
                raise AssertionError("bob may not")
        else:

            def call(through: str = through) -> None:
                return method() if through == "method" else handle.call()

            ways: dict[str, Callable[[], None]] = {
                "owner": lambda: owner.run(call),
                "other of hers": lambda: hers.run(call),
                "child": lambda: childs.run(call),
                "bob": lambda: bob.run(call),
                "granted": lambda: bob.run(granted, ["alice"], call),
                "granted another": lambda: bob.run(granted, ["carol"], call),
                "thread": lambda: in_thread(lambda: owner.copy().run(call)),
                "bare thread": lambda: in_thread(call),
                "nobody": lambda: copy_context().run(call),
            }
            foreign = action in ("bob", "granted another")
            expected = usable and not foreign and (action != "child" or child_open)
            before = target.reached
            try:
                ways[action]()
            except CrossUserAccessError:
                assert foreign
            except ContextClosedError:
                assert not expected
                assert not foreign
            assert target.reached - before == expected
    with manager.privileged(reason="a test", users=EVERYONE):
        manager.cleanup_all_contexts()
