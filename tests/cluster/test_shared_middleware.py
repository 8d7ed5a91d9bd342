"""Requests and connections of workers that share their users, on a real server."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from support.asgi import exchange, http_scope, status_of
from support.clock import Clock
from support.members import LEASE, SECRET
from support.memory_store import MemoryServer
from support.thread_server import served
from support.waiting import wait_until
from ucm_middleware import (
    CensusPolicy,
    ClusterPolicy,
    ClusterUnavailableError,
    UserContextManager,
    UserContextMiddleware,
    user_context,
)
from ucm_middleware.cluster.policy import LEAST_LEASE
from ucm_middleware.types import ASGIApp, Message

from .conftest import MakeShared, until_given_back


def who(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-user")


class App:
    """What the requests wait for, and what they met."""

    def __init__(self, manager: UserContextManager) -> None:
        self.manager = manager
        self.waiting = threading.Semaphore(0)
        self.go_on = asyncio.Event()
        self.met: list[str] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        routes = [
            Route("/plain", self.plain),
            Route("/wait", self.wait),
            Route("/login", self.login),
            WebSocketRoute("/socket", self.socket),
        ]
        self.app: ASGIApp = UserContextMiddleware(Starlette(routes=routes), manager=manager, identify=who)

    async def plain(self, request: Request) -> Response:
        return JSONResponse({"user": user_context(request).user_id})

    async def wait(self, request: Request) -> Response:
        self.loop = asyncio.get_running_loop()
        self.waiting.release()
        await self.go_on.wait()
        return await self.plain(request)

    async def login(self, request: Request) -> Response:
        try:
            user_context(request).bind("alice")
        except ClusterUnavailableError as error:
            return Response(status_code=503, headers={"retry-after": str(error.retry_after)})
        return await self.plain(request)

    async def socket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            async for text in websocket.iter_text():
                await websocket.send_text(text)
        except Exception as error:
            self.met.append(type(error).__name__)
            raise

    def until_waiting(self) -> None:
        assert self.waiting.acquire(timeout=10)

    def let_go_on(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.go_on.set)

    def turn(self) -> None:
        """Have the cluster's thread look at the clock."""
        member = self.manager.cluster
        assert member is not None
        member.call(member.upkeep.turn()).result(10)


@contextmanager
def running(manager: UserContextManager) -> Iterator[tuple[App, str]]:
    app = App(manager)
    with served(app.app) as port:
        yield app, f"127.0.0.1:{port}"


def ask(address: str, path: str = "/plain", user: str = "alice") -> httpx.Response:
    return httpx.get(f"http://{address}{path}", headers={"x-user": user} if user else {}, timeout=20)


class Asking(threading.Thread):
    """A request that is under way meanwhile."""

    def __init__(self, address: str, path: str) -> None:
        super().__init__(daemon=True)
        self._ask = (address, path)
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = ask(*self._ask)

    def status(self) -> int:
        self.join(20)
        assert self.answer is not None
        return self.answer.status_code


def socket(address: str, user: str = "alice") -> Any:
    return connect(f"ws://{address}/socket", additional_headers={"x-user": user})


def test_two_workers_have_one_limit(make_shared: MakeShared, store: MemoryServer) -> None:
    with running(make_shared()) as (first, one), running(make_shared()) as (second, two):
        waiting = [Asking(one, "/wait"), Asking(two, "/wait")]
        first.until_waiting()
        second.until_waiting()

        refused = ask(two)
        assert refused.status_code == 429
        assert ask(one, user="bob").json() == {"user": "bob"}
        assert ask(one, user="").status_code == 200

        first.let_go_on()
        second.let_go_on()
        assert [one.status() for one in waiting] == [200, 200]
        until_given_back(store)
        assert ask(two).status_code == 200


def test_anonymous_requests_ask_nobody_and_a_login_does(make_shared: MakeShared, store: MemoryServer) -> None:
    with running(make_shared()) as (_, address):
        store.is_down = True
        assert ask(address, user="").status_code == 200
        assert ask(address, "/login", user="").status_code == 503
        store.is_down = False


def test_requests_of_one_user_one_after_another_never_stand_in_their_own_way(
    make_shared: MakeShared, store: MemoryServer
) -> None:
    with running(make_shared(max_contexts_per_user=1)) as (_, address), httpx.Client() as client:
        for _ in range(100):
            assert client.get(f"http://{address}/plain", headers={"x-user": "alice"}).status_code == 200


def test_while_the_store_is_down_requests_are_refused_at_once(make_shared: MakeShared, store: MemoryServer) -> None:
    manager = make_shared()
    with running(manager) as (_, address):
        store.is_down = True
        assert ask(address).status_code == 503
        wait_until(lambda: manager.health().cluster == "down", "it is found out")
        store.commands.clear()

        refused = ask(address)

        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "acquire" not in store.commands
        with pytest.raises(InvalidStatus) as denied:
            socket(address)
        assert denied.value.response.status_code == 503


def test_under_the_policy_local_they_are_served(make_shared: MakeShared, store: MemoryServer) -> None:
    with running(make_shared("local")) as (_, address):
        store.is_down = True

        assert ask(address).status_code == 200
        with socket(address) as client:
            client.send("hello")
            assert client.recv() == "hello"


def test_a_recovering_store_says_when_to_come_again(make_shared: MakeShared, store: MemoryServer) -> None:
    manager = make_shared()
    with running(manager) as (_, address):
        assert ask(address).status_code == 200
        store.wipe()
        wait_until(lambda: manager.health().cluster == "recovering", "it is found out")

        refused = ask(address)

        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) == LEASE


def test_under_the_policy_local_who_comes_meanwhile_is_served_and_takes_a_place_afterwards(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    manager = make_shared("local")
    with running(manager) as (app, address):
        assert ask(address).status_code == 200
        wait_until(lambda: store.live() == {}, "its place is given back")
        store.wipe()
        app.turn()
        assert manager.health().cluster == "local"
        with socket(address) as client:
            client.send("hello")
            assert client.recv() == "hello"
            assert store.live() == {}
            clock.advance(LEASE)
            app.turn()
            wait_until(lambda: len(store.live()) == 1, "it has its place")
            client.send("still")
            assert client.recv() == "still"


def test_no_answer_begins_under_a_lost_lease(make_shared: MakeShared, store: MemoryServer, clock: Clock) -> None:
    """The worker was stopped for long: its handler goes on before anything has noticed."""
    with running(make_shared()) as (app, address):
        asking = Asking(address, "/wait")
        app.until_waiting()
        assert app.loop is not None

        def wake() -> None:
            clock.advance(2 * LEASE)
            app.go_on.set()

        app.loop.call_soon_threadsafe(wake)

        assert asking.status() == 503
        assert asking.answer is not None
        assert "retry-after" in asking.answer.headers


def test_a_handler_is_cut_off_when_the_lease_is_lost(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    with running(make_shared()) as (app, address):
        asking = Asking(address, "/wait")
        app.until_waiting()
        clock.advance(2 * LEASE)
        app.turn()

        assert asking.status() == 503


@pytest.mark.parametrize("when_unavailable", ["closed", "local"])
def test_a_connection_is_closed_when_its_lease_is_lost(
    when_unavailable: str, make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    with running(make_shared(when_unavailable)) as (app, address), socket(address) as client:
        client.send("hello")
        assert client.recv() == "hello"
        clock.advance(2 * LEASE)
        app.turn()

        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_nothing_is_sent_on_a_connection_under_a_lost_lease(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    with running(make_shared()) as (_, address), socket(address) as client:
        client.send("hello")
        assert client.recv() == "hello"
        clock.advance(2 * LEASE)
        client.send("are you there")

        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_no_event_is_sent_on_a_connection_under_a_lost_lease(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    manager = make_shared()
    with running(manager) as (_, address), socket(address) as client:
        client.send("hello")
        assert client.recv() == "hello"
        clock.advance(2 * LEASE)
        with manager.privileged(reason="a test", users=["alice"]):
            manager.post_event("alice", "news", {"secret": 1})

        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_the_census_finds_nothing_of_the_clusters(make_shared: MakeShared, store: MemoryServer) -> None:
    manager = make_shared(census=CensusPolicy(action="raise"))
    with running(manager) as (_, address), httpx.Client() as client:
        for _ in range(20):
            assert client.get(f"http://{address}/plain", headers={"x-user": "alice"}).status_code == 200
        assert client.get(f"http://{address}/login").status_code == 200
    trail = manager.get_audit_trail("alice") if manager.is_healthy() else None
    assert trail is None or "outlived" not in [event["event"] for event in trail["events"]]


def test_a_store_that_can_never_work_keeps_the_server_from_starting(
    make_shared: MakeShared, store: MemoryServer
) -> None:
    with running(make_shared()) as (_, address):
        assert ask(address).status_code == 200
    stranger = make_shared(secret=SECRET[::-1])

    with pytest.raises(RuntimeError, match="did not start"), running(stranger):
        pass


def test_the_server_waits_until_a_new_store_has_recovered(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    store.wipe()
    manager = make_shared(cluster=ClusterPolicy(url="memory://shared", lease=LEAST_LEASE, timeout=0.3))
    begun = time.monotonic()
    with running(manager) as (_, address):
        # It sleeps for as long as the store said that it takes: at least, however busy the machine is.
        assert time.monotonic() - begun >= LEAST_LEASE
        assert ask(address).status_code == 503  # the clock of the test stands still
        clock.advance(LEAST_LEASE)
        assert ask(address).status_code == 200


def test_a_shutdown_gives_everything_back(make_shared: MakeShared, store: MemoryServer) -> None:
    with ExitStack() as stack:
        _, address = stack.enter_context(running(make_shared()))
        with socket(address) as client:
            client.send("hello")
            assert client.recv() == "hello"
            assert len(store.live()) == 1
            stack.close()  # the server ends first
    assert store.live() == {}
    assert store.sessions == []


async def test_a_cancelled_request_leaves_no_slot_taken(make_shared: MakeShared, store: MemoryServer) -> None:
    """The server gives a request up while its lease is asked for: whether the order was done, or is done later."""
    manager = make_shared()
    app = App(manager)
    assert manager.cluster is not None
    await manager.cluster.ready()
    store.hold()

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    running = asyncio.ensure_future(app.app(http_scope("/plain", [("x-user", "alice")]), receive, send))
    await store.someone_waits.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    store.let_go()

    await asyncio.to_thread(until_given_back, store)
    sent = await exchange(app.app, http_scope("/plain", [("x-user", "alice")]))
    assert status_of(sent) == 200
    assert json.loads(sent[1]["body"]) == {"user": "alice"}
