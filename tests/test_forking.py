"""A forked child: free locks, no contexts of its parent's, and nothing that grows with each manager."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NoReturn

import pytest

import ucm_middleware
from ucm_middleware import UserContextManager
from ucm_middleware.forking import renewed_after_fork

# Each script runs in a process of its own, since Python 3.12 warns of a fork beside threads, which these are about. The
# child says how it fares by its exit status, and an alarm ends it when it hangs.
FORK = """
import asyncio, os, signal, sys, threading
from ucm_middleware import UserContextManager, managed_user_context

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def held(lock):
    holding = threading.Event()
    def hold():
        with lock:
            holding.set()
            threading.Event().wait()
    threading.Thread(target=hold, daemon=True).start()
    holding.wait()

manager = UserContextManager(max_contexts_per_user=1)
"""

WITH_LOCKS_HELD = """
for lock in (manager._registry._lock, manager._trail._ledger._lock, LIFETIME.transition, manager._sweeper._condition):
    held(lock)

def work():
    with managed_user_context(manager.create_isolated_context("carol", ttl_seconds=60)) as context:
        context.callback(int)
        context.create_child_context("part")
    assert manager.get_active_contexts() == {}
    assert manager.get_audit_trail("carol") is not None

code = in_child(work)
print("child", code, flush=True)
os._exit(0)  # the threads that hold the locks never end
""".replace("LIFETIME", "__import__('ucm_middleware.lifetime').lifetime.Lifetime")

WITH_CONTEXTS = """
released = []
context = manager.create_isolated_context("alice", "r-1")
context.callback(released.append, "alice's")
closing, may_close = threading.Event(), threading.Event()
slow = manager.create_isolated_context("bob")
slow.callback(lambda: (closing.set(), may_close.wait()))
threading.Thread(target=slow.close).start()
closing.wait()

def work():
    assert manager.get_active_contexts() == {}
    mine = manager.create_isolated_context("alice", "r-1")  # the parent's does not count
    assert manager.get_context(("alice", "r-1")) is mine
    mine.close()
    assert asyncio.run(manager.drain(20)) == 0
    assert released == []

def of_a_manager_that_drained():
    assert manager.is_healthy()
    manager.create_isolated_context("alice")

code = in_child(work)
assert manager.get_context(("alice", "r-1")) is context
context.close()
assert released == ["alice's"]
may_close.set()
asyncio.run(manager.drain(20))
print("child", code or in_child(of_a_manager_that_drained), flush=True)
"""

WITH_A_RUN = """
from ucm_middleware import AgentPolicy

manager = UserContextManager(agents=AgentPolicy(max_runs_per_user=1))
manager.register_agent("agent", lambda context: waits, stateless=True)
manager.register_agent("other", lambda context: ends, stateless=True)

async def waits():
    await asyncio.Event().wait()

async def ends():
    return "done"

async def parent():
    running = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    def work():
        asyncio.events._set_running_loop(None)
        assert asyncio.run(manager.execute_with_agent("alice", "other")) == "done"  # the parent's does not count
    print("child", in_child(work), flush=True)
    running.cancel()

asyncio.run(parent())
"""

INSIDE_OF_A_CONTEXT = """
from ucm_middleware import ContextClosedError, ContextNotFoundError, current_context

released = []
parent = os.getpid()

def raises(error, work):
    try:
        work()
    except error:
        return True
    raise AssertionError("the child may do it")

def fork_inside():
    context = manager.create_isolated_context("alice")
    context.agent_context["secret"] = "hush"
    with managed_user_context(context):
        context.callback(lambda: released.append(os.getpid()))
        with managed_user_context(context.create_child_context("part")) as part:
            part.callback(lambda: released.append(os.getpid()))
            with manager.privileged(reason="a test", users=["bob"]):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    raises(ContextNotFoundError, current_context)
                    for one in (context, part):
                        assert one.lifetime.reason == "forked"
                        raises(ContextClosedError, lambda: one.agent_context)
                        one.close()
    if child == 0:
        with managed_user_context(manager.create_isolated_context("alice")):
            assert current_context().user_id == "alice"
    return child

child = fork_inside()
if child == 0:
    os._exit(len(released))
assert released == [parent, parent]
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    "script",
    [WITH_LOCKS_HELD, WITH_CONTEXTS, WITH_A_RUN, INSIDE_OF_A_CONTEXT],
    ids=["with locks held", "with contexts", "with a run", "inside of a context"],
)
def test_a_child_begins_anew(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORK + script],
        env={**os.environ, "PYTHONPATH": str(Path(ucm_middleware.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("child 0\n", "", 0)


def test_a_manager_registers_nothing_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**handlers: object) -> NoReturn:
        raise AssertionError("a handler of a fork is there for ever")

    monkeypatch.setattr(os, "register_at_fork", refuse)
    manager = UserContextManager()
    manager.create_isolated_context("alice", ttl_seconds=60).close()


def test_what_is_renewed_is_not_kept() -> None:
    class Thing:
        def after_fork(self) -> None: ...

    thing = Thing()
    renewed_after_fork(thing)
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is None
