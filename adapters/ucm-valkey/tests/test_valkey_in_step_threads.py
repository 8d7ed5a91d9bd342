"""The same for code that blocks: exceptions that come out of nowhere, as from a signal handler.

A handler runs between any two instructions and may raise, as those of KeyboardInterrupt, gunicorn's timeout and many a
deadline by ``SIGALRM`` do. Both blocking clients of today give a connection back with a reply on its way where that
happens after a command was sent and before its reply is waited for. Here an exception is raised at each line in turn,
by the interpreter's own trace hook.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import redis
import valkey

import ucm_valkey
from support.tcp_proxy import TcpProxy
from support.valkey import SECRET, LibraryName, ValkeyServer, sync_pool
from ucm_middleware import UserContextManager, managed_user_context
from ucm_valkey import SyncValkeyCache

Place = tuple[str, int]

LIBRARIES: dict[LibraryName, ModuleType] = {"redis": redis, "valkey": valkey}
SLOWER = 0.002
"""Seconds by which a reply comes later: so that it is not there yet when the next borrower asks."""


class Alarm(BaseException):
    """What a signal handler raises."""


def places_of(call: Callable[[], object], *packages: ModuleType) -> list[Place]:
    """The lines of these packages that a call comes by."""
    seen: dict[Place, None] = {}

    def note(place: Place) -> None:
        seen[place] = None

    _traced(call, packages, note)
    return list(seen)


def alarmed_at(place: Place, call: Callable[[], object], *packages: ModuleType) -> bool:
    """Make a call in which an alarm goes off at this line, the first time it comes by. False if it does not."""
    gone_off = False

    def look(here: Place) -> None:
        nonlocal gone_off
        if here == place and not gone_off:
            gone_off = True
            raise Alarm

    try:
        _traced(call, packages, look)
    except BaseException:  # the alarm, or what the code that it hit made of it
        if not gone_off:
            raise
    return gone_off


def _traced(call: Callable[[], object], packages: tuple[ModuleType, ...], at_line: Callable[[Place], None]) -> None:
    folders = tuple(str(Path(package.__file__ or "").parent) + "/" for package in packages)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(folders):
            return None if event == "call" else trace
        if event == "line":
            at_line((file, frame.f_lineno))
        return trace

    failed: list[BaseException] = []

    def run() -> None:
        sys.settrace(trace)
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - whoever asked for the call gets it
            failed.append(error)
        finally:
            sys.settrace(None)

    # In a thread of its own: what goes off where the interpreter just leaves an `except` can stay the exception that
    # the thread is handling, and would be the context of every later one.
    thread = threading.Thread(target=copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if failed:
        raise failed.pop()  # kept nowhere: it holds the frames, and connections in them


def alarming_connection(library: LibraryName) -> Any:
    """A connection on which an alarm goes off after a command was sent, before its reply is waited for: once armed."""
    current: Any = LIBRARIES[library].Connection

    class AlarmingConnection(current):  # type: ignore[misc]
        is_armed = False

        def read_response(self, *arguments: Any, **options: Any) -> Any:
            if AlarmingConnection.is_armed:
                AlarmingConnection.is_armed = False
                raise Alarm
            return super().read_response(*arguments, **options)

    return AlarmingConnection


def test_the_adapter_closes_such_a_connection_and_the_next_borrower_is_served(
    library: LibraryName, valkey_proxy: TcpProxy
) -> None:
    kind = alarming_connection(library)
    pool = sync_pool(library, valkey_proxy.port, 1, connection_class=kind)
    cache = SyncValkeyCache(pool)
    manager = UserContextManager(secret=SECRET)
    for user_id in ("alice", "bob"):
        with managed_user_context(manager.create_isolated_context(user_id)):
            cache.current().set("a", f"for {user_id}")
    valkey_proxy.delay("replies", 0.05)
    with managed_user_context(manager.create_isolated_context("alice")):
        kind.is_armed = True
        with pytest.raises(Alarm):
            cache.current().get("a")
    with managed_user_context(manager.create_isolated_context("bob")):
        assert cache.current().get("a") == b"for bob"
    pool.disconnect()


@pytest.fixture
def make_pool(library: LibraryName, valkey_proxy: TcpProxy) -> Iterator[Callable[[], Any]]:
    made: list[Any] = []

    def make() -> Any:
        # A connection that an alarm took from the pool is gone: who comes next waits, and is told.
        pool = sync_pool(library, valkey_proxy.port, 1, timeout=0.05)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.disconnect()


def test_a_bare_client_hands_on_a_reply_today(
    library: LibraryName, make_pool: Callable[[], Any], valkey_proxy: TcpProxy, valkey_server: ValkeyServer
) -> None:
    valkey_server.admin.mset({"alice's": b"for alice", "bob's": b"for bob"})
    kind: Any = redis.Redis if library == "redis" else valkey.Valkey

    def client() -> Any:
        made = kind.from_pool(make_pool())
        made.ping()
        return made

    warm = client()
    leaks: list[Place] = []
    for place in places_of(lambda: warm.get("alice's"), LIBRARIES[library]):
        alice_or_bob = client()
        valkey_proxy.delay("replies", SLOWER)
        if alarmed_at(place, lambda client=alice_or_bob: client.get("alice's"), LIBRARIES[library]):  # type: ignore[misc]
            try:
                if alice_or_bob.get("bob's") == b"for alice":
                    leaks.append(place)
            except (redis.ConnectionError, valkey.ConnectionError):
                pass  # the connection is lost to the pool, which is another matter
        valkey_proxy.delay("replies", 0)
        if leaks:
            return
    raise AssertionError("it is safe now: say so in the README")


# A connection that an alarm took from whoever would have closed it is closed when it is collected, with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_new", [False, True], ids=["connected", "connecting"])
def test_through_the_adapter_nobody_gets_another_s_reply(
    is_new: bool, library: LibraryName, make_pool: Callable[[], Any], valkey_proxy: TcpProxy
) -> None:
    manager = UserContextManager(secret=SECRET)

    def get(cache: SyncValkeyCache, user_id: str) -> bytes | None:
        with managed_user_context(manager.create_isolated_context(user_id)):
            return cache.current().get("a")

    def prepared() -> SyncValkeyCache:
        cache = SyncValkeyCache(make_pool())
        if not is_new:
            assert get(cache, "alice") == b"for alice"
        return cache

    filling = SyncValkeyCache(make_pool())
    for user_id in ("alice", "bob"):
        with managed_user_context(manager.create_isolated_context(user_id)):
            filling.current().set("a", f"for {user_id}")

    packages = (LIBRARIES[library], ucm_valkey)
    first = prepared()
    places = places_of(lambda: get(first, "alice"), *packages)
    answered = failed = 0
    for place in places[:: 5 if is_new else 2]:  # there are many to go by, while it connects most of all
        cache = prepared()
        valkey_proxy.delay("replies", SLOWER)
        if alarmed_at(place, lambda cache=cache: get(cache, "alice"), *packages):  # type: ignore[misc]
            try:
                reply = get(cache, "bob")
            except Exception:  # noqa: BLE001 - what an alarm left behind in the client's own objects fails in any way
                failed += 1
            else:
                assert reply == b"for bob", place
                answered += 1
        valkey_proxy.delay("replies", 0)
    assert answered > 20
    assert failed  # the alarm did hit where it hurts
