"""The parts by themselves, servers of one user, and what is refused at the start."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import mcp_types as types
import pytest
from event_store import MemoryEventStore
from fastmcp import FastMCP
from key_value.aio.stores.memory import MemoryStore
from mcp import Client, MCPError, StdioServerParameters
from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.request_state import RequestStateBoundary
from mcp.server.streamable_http import EventMessage
from mcp.shared.subscriptions import ResourceUpdated, ToolsListChanged
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from raw_mcp import ACCEPT, INITIALIZE, RawMCP, call
from ucm_middleware import (
    ConfigurationError,
    ContextNotFoundError,
    CrossUserAccessError,
    Principal,
    UserContextManager,
    UserContextMiddleware,
    current_context,
    managed_user_context,
)
from ucm_middleware_mcp import MCP, UserEventStore, UserSubscriptionBus
from ucm_middleware_mcp import library as library_module
from ucm_middleware_mcp.fast import UserStateStore
from ucm_middleware_mcp.gate import SessionGate, SseGate
from ucm_middleware_mcp.identity import Identity
from ucm_middleware_mcp.outbound import OwnedChannel
from ucm_middleware_mcp.plugin import _principal  # pyright: ignore[reportPrivateUsage]
from ucm_middleware_mcp.sessions import Session, Sessions, serving

SECRET = "q0Zk3-Vb8hTt5yLx_7RrNn2cWwPp9sJd"


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager(secret=SECRET)


@pytest.mark.parametrize(("kind", "mode"), [("sdk", "legacy"), ("lowlevel", "auto"), ("fastmcp", "auto")])
async def test_one_user_on_standard_input(kind: str, mode: Any) -> None:
    apps = Path(__file__).parent / "apps"
    env = {"NOTES_FRAMEWORK": kind, "UCM_MCP_USER": "alice", "UCM_ENVIRONMENT": "testing", "PYTHONWARNINGS": "ignore"}
    parameters = StdioServerParameters(command=sys.executable, args=[str(apps / "mcp_stdio.py")], env=env)
    async with Client(parameters, mode=mode) as client:
        for tool in ("whoami", "whoami_sync"):
            found: Any = await client.call_tool(tool, {})
            assert json.loads(found.content[0].text) == {"user": "alice", "depth": 1}


async def test_standard_input_without_a_user(manager: UserContextManager) -> None:
    with pytest.raises(ConfigurationError, match="UCM_MCP_USER"):
        await MCP().run_stdio(MCPServer("notes"), manager)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_in_the_same_process(manager: UserContextManager, mode: Any) -> None:
    """It runs as whoever calls, and without a user not at all."""
    server = MCPServer("notes")

    @server.tool()
    async def whoami() -> str:
        return current_context().user_id

    MCP().app(server)
    async with managed_user_context(manager.create_isolated_context("alice")), Client(server, mode=mode) as client:
        found: Any = await client.call_tool("whoami", {})
        assert found.content[0].text == "alice"
    with pytest.raises((MCPError, ExceptionGroup)):
        async with Client(server, mode=mode) as client:
            await client.call_tool("whoami", {})


async def test_a_connection_s_way_to_its_client_is_its_user_s(manager: UserContextManager) -> None:
    """Code of another user's that was handed her session can neither ask nor tell her anything."""
    server = MCPServer("notes")
    kept: list[Any] = []

    @server.tool()
    async def keep(ctx: Context) -> str:
        kept.append(ctx.session)
        return "kept"

    MCP().app(server)
    heard: list[Any] = []

    async def hear(message: Any) -> None:
        heard.append(message)

    async with (
        managed_user_context(manager.create_isolated_context("alice")),
        Client(server, mode="legacy", message_handler=hear) as client,
    ):
        await client.call_tool("keep", {})

        async def as_bob() -> None:
            with manager.privileged(reason="test", users=["bob"]):
                bob = manager.create_isolated_context("bob")
                with managed_user_context(bob):
                    for send in (kept[0].send_resource_updated("note://bob"), kept[0].send_ping()):
                        with pytest.raises(CrossUserAccessError):
                            await send

        await asyncio.create_task(as_bob())
        await kept[0].send_resource_updated("note://alice")
        await client.call_tool("keep", {})
    assert [message.params.uri for message in heard] == ["note://alice"]


async def test_a_call_s_way_to_its_client_is_its_user_s(manager: UserContextManager) -> None:
    server = MCPServer("notes")
    lent: asyncio.Queue[Any] = asyncio.Queue()
    back = asyncio.Event()

    @server.tool()
    async def lend(ctx: Context) -> str:
        lent.put_nowait(ctx)
        await back.wait()
        await ctx.report_progress(2)
        return "back"

    MCP().app(server)
    told: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    async def as_bob() -> None:
        ctx = await lent.get()
        with manager.privileged(reason="test", users=["bob"]):
            bob = manager.create_isolated_context("bob")
            with managed_user_context(bob), pytest.raises(CrossUserAccessError):
                await ctx.report_progress(1)
        back.set()

    other = asyncio.create_task(as_bob())
    async with (
        managed_user_context(manager.create_isolated_context("alice")),
        Client(server, mode="legacy") as client,
    ):
        await client.call_tool("lend", {}, progress_callback=note)
    await other
    assert told == [2]


async def test_the_channel_that_is_guarded_is_what_it_was(manager: UserContextManager) -> None:
    class Channel:
        name = "channel"

        def __init__(self) -> None:
            self.seen: list[Any] = []

        async def notify(self, *given: Any) -> None:
            self.seen.append(given)

        async def send_raw_request(self, *given: Any) -> dict[str, Any]:
            self.seen.append(given)
            return {"answer": 1}

        async def progress(self, *given: Any) -> None:
            self.seen.append(given)

    channel = Channel()
    alice = manager.create_isolated_context("alice")
    guarded = OwnedChannel(channel, alice.host, "alice")  # type: ignore[arg-type]
    assert guarded.name == "channel"
    with managed_user_context(alice):
        await guarded.notify("n", None)
        assert await guarded.send_raw_request("r", None) == {"answer": 1}
        await guarded.progress(1)
    assert [each[0] for each in channel.seen] == ["n", "r", 1]
    with managed_user_context(manager.create_isolated_context("bob")):
        for refused in (guarded.notify("n", None), guarded.send_raw_request("r", None), guarded.progress(1)):
            with pytest.raises(CrossUserAccessError):
                await refused
    assert len(channel.seen) == 3


async def test_subscribers_hear_their_own(manager: UserContextManager) -> None:
    bus = UserSubscriptionBus()
    heard: dict[str, list[Any]] = {"alice": [], "bob": []}
    ends = []
    for user, events in heard.items():
        with managed_user_context(manager.create_isolated_context(user)):
            ends.append(bus.subscribe(events.append))

            def fails(_: Any) -> None:
                raise OSError("down")

            bus.subscribe(fails)
    with managed_user_context(manager.create_isolated_context("alice")):
        await bus.publish(ResourceUpdated(uri="note://alice"))
    await bus.publish_to_everyone(ToolsListChanged())
    assert heard["alice"] == [ResourceUpdated(uri="note://alice"), ToolsListChanged()]
    assert heard["bob"] == [ToolsListChanged()]
    with pytest.raises(ContextNotFoundError):
        await bus.publish(ToolsListChanged())
    with pytest.raises(ContextNotFoundError):
        bus.subscribe(heard["bob"].append)
    ends[0]()
    ends[0]()
    await bus.publish_to_everyone(ToolsListChanged())
    assert len(heard["alice"]) == 2


async def test_events_are_their_session_s(manager: UserContextManager) -> None:
    """By its own name, and also where somebody writes the own name before another session's number."""
    asked: list[str] = []

    class Inner(MemoryEventStore):
        async def replay_events_after(self, last_event_id: str, send_callback: Any) -> str | None:
            asked.append(last_event_id)
            return await super().replay_events_after(last_event_id, send_callback)

    store = UserEventStore(Inner())
    message = types.JSONRPCNotification(jsonrpc="2.0", method="notifications/secret")
    hers, his = session("alice"), session("bob")
    ids = {}
    for each in (hers, his):
        serving.set(each)
        ids[each.owner] = [await store.store_event("1", message) for _ in range(2)]
    found: list[EventMessage] = []

    async def keep(event: EventMessage) -> None:
        found.append(event)

    forged = f"{his.name}.{ids['alice'][0].partition('.')[2]}"
    with managed_user_context(manager.create_isolated_context("bob")):
        for foreign in (ids["alice"][0], forged, "1", "odd", f"{his.name}.99"):
            assert await store.replay_events_after(foreign, keep) is None
            assert found == []
        assert await store.replay_events_after(ids["bob"][0], keep) == "1"
    assert [event.event_id for event in found] == [ids["bob"][1]]
    assert asked == ["1", "99", "3"]  # and not for what the name tells already
    serving.set(None)
    with pytest.raises(ConfigurationError, match="MCP"):
        await store.store_event("1", message)


@pytest.mark.parametrize("made", [MCPServer, FastMCP])
async def test_events_are_their_session_s_without_being_asked(made: Any) -> None:
    """Where an application gives its store as it is, and another user has opened a session of his own."""
    server: Any = made("notes")

    async def whoami() -> str:
        return current_context().user_id

    server.tool()(whoami)
    inner = MemoryEventStore()
    async with in_process(MCP(), server, event_store=inner) as client:
        alice, bob = (RawMCP(client, {"user": user}) for user in ("alice", "bob"))
        for each in (alice, bob):
            await each.open()
            await each.result(call("whoami", 5))
    streams = {stream.partition(".")[0] for stream, _ in inner.events}
    assert len(streams) == 2
    assert all("." in stream for stream, _ in inner.events)  # by the names that nobody but the adapter knows


async def test_subscribers_hear_their_own_without_being_asked() -> None:
    """The SDK makes one bus for everybody where the application says nothing. What it says stands."""
    bus, mcp = UserSubscriptionBus(), MCP()
    for server, kept in ((MCPServer("notes"), None), (MCPServer("notes", subscriptions=bus), bus)):
        mcp.app(server)
        inner: Any = server._subscriptions
        entry: Any = server._lowlevel_server.get_request_handler("subscriptions/listen")
        assert isinstance(inner, UserSubscriptionBus)
        assert entry.handler._bus is inner
        assert kept is None or inner is kept
    mcp.app(MCPServer("notes", subscriptions=False))


async def test_state_is_its_user_s(manager: UserContextManager) -> None:
    inner = MemoryStore()
    store = UserStateStore(inner)
    with managed_user_context(manager.create_isolated_context("alice")):
        await store.put("session:key", {"v": 1}, collection="c", ttl=60)
        await store.put_many(["a", "b"], [{"v": 2}, {"v": 3}])
        assert await store.get("session:key", collection="c") == {"v": 1}
        assert await store.get("session:key") is None
        assert (await store.ttl("session:key", collection="c"))[1] is not None
        assert await store.get_many(["a", "b", "c"]) == [{"v": 2}, {"v": 3}, None]
    with managed_user_context(manager.create_isolated_context("bob")):
        assert await store.get("session:key", collection="c") is None
        assert await store.ttl_many(["a"]) == [(None, None)]
        assert await store.delete("a") is False
        assert await store.delete_many(["a", "b"]) == 0
    with managed_user_context(manager.create_isolated_context("alice")):
        assert await store.delete("a") is True
        assert await store.delete_many(["a", "b"]) == 1
    with pytest.raises(ContextNotFoundError):
        await store.get("a")


async def test_state_outlives_a_rotation_of_the_secret() -> None:
    inner = MemoryStore()
    store = UserStateStore(inner)
    before = UserContextManager(secret=SECRET)
    with managed_user_context(before.create_isolated_context("alice")):
        await store.put("a", {"v": 1})
    after = UserContextManager(secret=SECRET[::-1], previous_secrets=[SECRET])
    with managed_user_context(after.create_isolated_context("alice")):
        assert await store.get("a") == {"v": 1}
        assert await store.delete("a") is True
        assert await store.get("a") is None


async def test_sessions_end_from_any_thread() -> None:
    ended: list[str | None] = []
    done = asyncio.Event()

    async def end(one: Session) -> None:
        ended.append(one.session_id)
        if one.session_id == "2":
            raise OSError("down")
        if len(ended) == 2:
            done.set()

    sessions = Sessions()
    for number, user in enumerate(("alice", "alice", "alice", "bob"), 1):
        sessions.add(Session(user, end), str(number))
    sessions.forget(cast("Session", sessions.get("1")))
    thread = threading.Thread(target=sessions.end_all_of, args=("alice",))
    thread.start()
    thread.join()
    assert [sessions.get(name) is None for name in "1234"] == [True, True, True, False]
    await done.wait()
    assert sorted(map(str, ended)) == ["2", "3"]
    assert len(sessions) == 1


async def test_the_state_of_a_call_in_rounds_is_its_user_s(manager: UserContextManager) -> None:
    server = MCPServer("notes")
    MCP().app(server)
    boundary = next(each for each in server.middleware if isinstance(each, RequestStateBoundary))
    assert boundary._security.bind_principal is _principal  # pyright: ignore[reportPrivateUsage]
    said, nothing = [], cast("Any", None)
    for user in ("alice", "bob", "alice"):
        with managed_user_context(manager.create_isolated_context(user)):
            said.append(_principal(nothing))
    assert said[0] == said[2] != said[1]


def test_servers_that_are_none() -> None:
    for odd in (object(), "notes", None):
        with pytest.raises(ConfigurationError, match="no MCP server"):
            MCP().app(odd)
    with pytest.raises(ConfigurationError, match="SSE"):
        MCP().app(Server("notes"), transport="sse")
    with pytest.raises(ConfigurationError, match="'http' or 'sse'"):
        MCP().app(Server("notes"), transport="ws")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    for odd in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match="timeout"):
            MCP(timeout=odd)
    with pytest.raises(ConfigurationError, match="sessions_per_user"):
        MCP(sessions_per_user=0)


@asynccontextmanager
async def in_process(mcp: MCP, server: Any, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a server in this process; who calls says who it is."""
    app: Any = mcp.app(server, **options)
    manager = UserContextManager(plugins=[mcp])
    served = UserContextMiddleware(app, manager=manager, identify=lambda connection: connection.headers.get("user"))
    transport, url = httpx.ASGITransport(served), "http://127.0.0.1:80"
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=url, headers={"host": "127.0.0.1:80"}) as client,
    ):
        yield client


class Told:
    """A verifier that believes what tokens say: the user, and from when on they are over."""

    async def verify_token(self, token: str) -> AccessToken | None:
        user, _, expires_at = token.partition(":")
        expires = int(expires_at) if expires_at else None
        return AccessToken(token=token, client_id="app", scopes=[], subject=user, expires_at=expires)


async def by_token(mcp: MCP, token: str, manager: UserContextManager | None, user: str | None = None) -> int | str:
    """A request to a server that authenticates by tokens, in this process: its status, or how it is set up wrongly."""
    auth = AuthSettings(issuer_url=AnyHttpUrl("http://127.0.0.1/"), resource_server_url=None)
    app: Any = mcp.app(MCPServer("notes", auth=auth, token_verifier=Told()))
    served = app if manager is None else UserContextMiddleware(app, manager=manager, identify=lambda _: user)
    headers = {"authorization": f"Bearer {token}", "accept": ACCEPT, "host": "127.0.0.1:80"}
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(served)) as client:
        try:
            return (await client.post("http://127.0.0.1:80/mcp", json=INITIALIZE, headers=headers)).status_code
        except ConfigurationError as error:
            return str(error)


async def test_whom_a_token_stands_for() -> None:
    async def known(token: AccessToken) -> str | None:
        return None if token.subject == "nobody" else token.subject

    mcp = MCP(resolve=known)
    manager = UserContextManager(plugins=[mcp])
    assert await by_token(mcp, "alice", manager) == 200
    assert await by_token(mcp, "alice", manager, "alice") == 200
    assert await by_token(mcp, "alice", manager, "bob") == 409
    assert await by_token(mcp, "nobody", manager) == 401
    assert await by_token(mcp, "alice:1", manager) == 401  # by the SDK: the token is over
    assert await by_token(mcp, "anonymous_1", manager) == 400


@pytest.mark.parametrize("lasts", [True, False])
@pytest.mark.parametrize("found", [str, Principal])
async def test_a_context_ends_with_its_token(lasts: bool, found: Any) -> None:
    expires_at = None if lasts else int(time.time()) + 100
    token = AccessToken(token="t", client_id="app", scopes=[], subject="alice", expires_at=expires_at)
    identity = Identity(lambda token: found(token.subject), lambda _: True)
    seen: list[tuple[str, bool]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        context = await identity.context_of({**scope, "user": AuthenticatedUser(token)})
        seen.append((context.user_id, context.lifetime.deadline is None))
        await PlainTextResponse("")(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(UserContextMiddleware(app))) as client:
        await client.get("http://127.0.0.1/")
    assert seen == [("alice", lasts)]


async def test_what_is_missing_is_named() -> None:
    mcp = MCP()
    manager = UserContextManager(plugins=[mcp])
    assert "resolve" in str(await by_token(mcp, "alice", manager))
    assert await by_token(mcp, "alice", manager, "bob") == 200  # who it is, the application in front has said
    assert "plugins=[mcp]" in str(await by_token(mcp, "alice", UserContextManager()))
    assert "UserContextMiddleware" in str(await by_token(mcp, "alice", None))


@pytest.mark.parametrize("stateless", [True, False])
async def test_a_server_that_is_served_past_its_gate(stateless: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is served: replies and cancellations, which no middleware of the SDK's sees, would come to anybody's."""
    server, mcp = MCPServer("notes"), MCP()

    @server.tool()
    async def whoami() -> str:
        return current_context().user_id

    mcp.app(server)
    app: Any = server.streamable_http_app(json_response=True, stateless_http=stateless)
    manager = UserContextManager(plugins=[mcp])
    served = UserContextMiddleware(app, manager=manager, identify=lambda connection: connection.headers.get("user"))
    url = "http://127.0.0.1:80"
    headers = {"host": "127.0.0.1:80", "user": "alice", "accept": ACCEPT}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url=url, headers=headers) as client,
    ):
        opened = await client.post("/mcp", json=INITIALIZE)
        assert opened.json()["error"]["message"] == "The server is not set up for this."
        more = {} if stateless else {"mcp-session-id": opened.headers["mcp-session-id"]}
        called = await client.post("/mcp", json=call("whoami"), headers=more)
        assert called.json()["error"]["message"] == "The server is not set up for this."
    assert "MCP().app()" in caplog.text


async def test_a_user_has_so_many_sessions() -> None:
    """Idle ones count: the SDK's own limit is one for all users, and one user could take it up."""
    mcp = MCP(sessions_per_user=2)
    async with in_process(mcp, MCPServer("notes")) as client:
        alice, bob = (RawMCP(client, {"user": user}) for user in ("alice", "bob"))
        opened = [await alice.open() for _ in range(2)]
        refused = await client.post("/mcp", json=INITIALIZE, headers=alice.of(None))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        await bob.open()
        assert (await client.delete("/mcp", headers=alice.of(opened[0]))).status_code == 200
        assert (await client.post("/mcp", json=INITIALIZE, headers=alice.of(None))).status_code == 200
        refused = await client.post("/mcp", json=INITIALIZE, headers=alice.of(None))
        assert refused.status_code == 429
        # What opens none takes no place, and those that are being opened have theirs.
        assert (await client.post("/mcp", json=call("whoami"), headers=bob.of(None))).status_code == 400
        opening = [client.post("/mcp", json=INITIALIZE, headers=bob.of(None)) for _ in range(3)]
        assert sorted([answer.status_code for answer in await asyncio.gather(*opening)]) == [200, 429, 429]


async def test_a_session_that_never_came_to_be_is_forgotten() -> None:
    """The transport has named it, and what would open it was lost."""
    asked: list[tuple[str, bytes]] = []
    ended = asyncio.Event()

    async def transport(scope: Any, receive: Any, send: Any) -> None:
        named = dict(scope["headers"]).get(b"mcp-session-id", b"")
        asked.append((scope["method"], named))
        if len([each for each in asked if each == ("DELETE", b"1")]) == 2:
            ended.set()
        await Response("", headers={"mcp-session-id": "1"})(scope, receive, send)

    sessions = Sessions()
    identity = Identity(None, lambda _: True)
    gate = UserContextMiddleware(
        SessionGate(transport, sessions, identity, most=1, is_stateless=False), identify=lambda _: "alice"
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate)) as client:
        for _ in range(2):
            assert (await client.post("http://127.0.0.1/mcp", json=INITIALIZE)).status_code == 200
            assert len(sessions) == 0
        await ended.wait()
    assert asked[0] == ("POST", b"")


async def test_a_connection_belongs_to_its_first_user(manager: UserContextManager) -> None:
    """On transports without requests, messages of the connection's first user alone are run."""
    server = MCPServer("notes")

    @server.tool()
    async def whoami() -> str:
        return current_context().user_id

    MCP().app(server)
    lent: asyncio.Queue[Client] = asyncio.Queue()

    async def as_bob() -> None:
        client = await lent.get()
        with (
            managed_user_context(manager.create_isolated_context("bob")),
            pytest.raises(MCPError, match="Session not found"),
        ):
            await client.call_tool("whoami", {})

    other = asyncio.create_task(as_bob())  # made here, where nobody's context is current
    async with (
        managed_user_context(manager.create_isolated_context("alice")),
        Client(server, mode="legacy") as client,
    ):
        await client.call_tool("whoami", {})
        lent.put_nowait(client)
        await other
    trail = manager.get_audit_trail("bob")
    assert trail is not None
    assert [event["action"] for event in trail["events"] if event["event"] == "denied"] == ["mcp_session"]


def test_an_application_without_its_routes_is_not_served() -> None:
    class Changed(MCPServer):
        def streamable_http_app(self, **_: Any) -> Starlette:
            return Starlette()

    with pytest.raises(ConfigurationError, match="no route /mcp"):
        MCP().app(Changed("notes"))


@pytest.mark.parametrize("paths", [("/mcp", "/mcp"), ("/mcp/", "/mcp"), ("/sse", "/messages/")])
async def test_both_ends_of_the_older_transport_have_their_gate(paths: tuple[str, str]) -> None:
    """Also where one path serves both."""
    app = MCP().app(MCPServer("notes"), transport="sse", sse_path=paths[0], message_path=paths[1])
    ends = [route for route in app.routes if isinstance(route, Route | Mount)]
    assert [type(route.app) for route in ends] == [SseGate, SseGate]


@pytest.mark.parametrize("name", ["a\nb", "x" * 129])
def test_names_that_no_record_can_have(name: str) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        MCP().app(MCPServer(name))


def test_a_server_has_one_adapter() -> None:
    server, mcp = MCPServer("notes"), MCP()
    mcp.app(server)
    mcp.app(server, transport="sse")
    assert len([each for each in server.middleware if type(each).__name__ == "UserCalls"]) == 1
    with pytest.raises(ConfigurationError, match="another MCP"):
        MCP().app(server)


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "version", lambda _: "2.2.9")
    with pytest.raises(ConfigurationError, match=r"mcp 2\.2\.9 is installed.*2\.3.*pip install 'mcp>=2\.3'"):
        library_module.require("mcp", library_module.MCP_FLOOR)
    for fine in ("2.3.0", "2.3rc1", "3.0", "2.10"):
        monkeypatch.setattr(library_module, "version", lambda _, found=fine: found)
        library_module.require("mcp", library_module.MCP_FLOOR)


def session(owner: str) -> Session:
    async def end(_: Session) -> None:
        return None

    return Session(owner, end)
