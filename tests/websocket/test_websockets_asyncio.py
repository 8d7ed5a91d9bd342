"""Handlers of websockets.asyncio.server, served and called by the library itself over loopback."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from websockets.asyncio.router import Router
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from werkzeug.routing import Map, Rule

from support.contexts import MakeManager, events, running_as
from support.library import (
    BAD_FRAMES,
    Diary,
    client,
    ending_of,
    eventually,
    handshake,
    identify,
    raw,
    read_head,
    refusal_of,
    serving,
)
from support.servers import HOST
from support.tracing import Sdk, about, installed
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextLimitError,
    CrossUserAccessError,
    EventPolicy,
    IdentityConflictError,
    InvalidContextError,
    Principal,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    bearer_token,
    current_context,
    hookimpl,
)
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import Message
from ucm_middleware.websocket.websockets import wrap_handler
from ucm_middleware.websocket.websockets.asyncio_server import AsyncioHandler

NOTE: ContextVar[str] = ContextVar("note", default="nothing")


@pytest.fixture
def manager(make_manager: MakeManager) -> UserContextManager:
    return make_manager(guard="open")


def live(manager: UserContextManager) -> int:
    return len(manager.get_active_contexts())


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(f"{current_context().user_id}: {message!s}")


async def forever(connection: ServerConnection) -> None:
    """Waits for something else than its client."""
    await connection.send("ready")
    await asyncio.Event().wait()


async def until_closed(connection: ServerConnection) -> None:
    await connection.send("ready")
    await connection.wait_closed()


def wrapped(
    manager: UserContextManager, handler: Callable[[ServerConnection], Awaitable[None]] = echo, **settings: Any
) -> AsyncioHandler:
    settings.setdefault("identify", identify)
    return wrap_handler(handler, manager=manager, **settings)


@asynccontextmanager
async def conversation(handler: AsyncioHandler, user: str = "alice", **options: Any) -> AsyncIterator[Any]:
    async with serving(handler, **options) as url, client(url, user) as connection:
        yield connection


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test is given to raise must not hold the test's frames once it has ended."""
    yield
    raised = getattr(request.node, "callspec", None) and request.node.callspec.params.get("raised")
    if isinstance(raised, Exception):
        raised.__traceback__ = raised.__context__ = None


class TestIdentity:
    async def test_the_handler_runs_for_whom_the_resolver_found(self, manager: UserContextManager) -> None:
        async with serving(wrapped(manager)) as url, client(url, "alice") as alice, client(url, "bob") as bob:
            await alice.send("hi")
            await bob.send(b"hi")
            assert (await alice.recv(), await bob.recv()) == ("alice: hi", "bob: b'hi'")
            assert live(manager) == 2
        assert live(manager) == 0

    async def test_a_resolver_sees_the_request_as_starlette_shows_it(self, manager: UserContextManager) -> None:
        seen: list[HTTPConnection] = []

        def look(connection: HTTPConnection) -> str:
            seen.append(connection)
            return "alice"

        async with serving(wrapped(manager, identify=look)) as url:
            async with client(f"{url}/a%20b?x=1&y=%C3%A9", headers={"X-Name": "value"}, subprotocols=["chat"]):
                pass
            port = int(url.rpartition(":")[2])
        [connection] = seen
        assert connection.url.path == "/a b"
        assert connection.scope["raw_path"] == b"/a%20b"
        assert dict(connection.query_params) == {"x": "1", "y": "é"}
        assert connection.headers["x-name"] == "value"
        assert connection.client is not None
        assert connection.client.host == HOST
        assert connection.url.port == port
        assert (connection.scope["scheme"], connection.scope["subprotocols"]) == ("ws", ["chat"])

    @pytest.mark.parametrize(
        ("raised", "status"),
        [
            (UnauthenticatedError("no"), 401),
            (CrossUserAccessError("no"), 403),
            (InvalidContextError("user_id", "is odd", "give another"), 400),
            (IdentityConflictError("no"), 409),
            (ContextLimitError("user", 1, "wait"), 429),
            (HTTPException(418, "no tea"), 418),
        ],
    )
    async def test_a_refusal_is_a_status_and_not_a_closed_connection(
        self, manager: UserContextManager, raised: Exception, status: int
    ) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise raised

        handled: list[ServerConnection] = []

        async def handler(connection: ServerConnection) -> None:
            handled.append(connection)

        async with serving(wrapped(manager, handler, identify=refuse)) as url:
            found, headers, body = await refusal_of(client(url))
        assert found == status
        assert set(body) == {"detail"}
        assert (headers["cache-control"], headers["connection"]) == ("no-store", "close")
        assert ("retry-after" in headers) == (status == 429)
        assert ("www-authenticate" in headers) == (status == 401)
        assert not handled
        assert live(manager) == 0

    async def test_nobody_and_bad_ids_are_refused(self, manager: UserContextManager) -> None:
        async with serving(wrapped(manager, require_identity=True)) as url:
            assert (await refusal_of(client(url)))[0] == 401
            assert (await refusal_of(client(url, "a\tb")))[0] == 400
        [first, _] = manager.get_system_trail()
        assert (first["event"], first["outcome"]) == ("refused", "denied")

    async def test_nobody_is_anonymous_and_may_be_bound(self, manager: UserContextManager) -> None:
        async def log_in(connection: ServerConnection) -> None:
            context = current_context()
            assert context.is_anonymous
            context.bind(str(await connection.recv()))
            await manager.send_event("alice", "hello")
            await connection.recv()

        async with serving(wrapped(manager, log_in)) as url, client(url) as connection:
            await connection.send("alice")
            assert json.loads(await connection.recv())["type"] == "hello"

    async def test_a_resolver_may_wait(self, manager: UserContextManager) -> None:
        async def verify(token: str) -> Principal | None:
            await asyncio.sleep(0)
            return Principal("alice") if token == "good" else None

        async with serving(wrapped(manager, identify=bearer_token(verify), require_identity=True)) as url:
            assert (await refusal_of(client(url, headers={"Authorization": "Bearer bad"})))[0] == 401
            async with client(url, headers={"Authorization": "Bearer good"}) as connection:
                await connection.send("hi")
                assert await connection.recv() == "alice: hi"

    async def test_a_plugin_may_identify(self, make_manager: MakeManager) -> None:
        class Plugin:
            @hookimpl
            async def ucm_identify(self, connection: HTTPConnection) -> str | None:
                await asyncio.sleep(0)
                return connection.headers.get("x-user")

        manager = make_manager(guard="open", plugins=[Plugin()])
        async with conversation(wrap_handler(echo, manager=manager, require_identity=True)) as connection:
            await connection.send("hi")
            assert await connection.recv() == "alice: hi"

    async def test_a_broken_resolver_is_a_500_and_an_error_in_the_log(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(connection: HTTPConnection) -> str:
            raise LookupError("no key server")

        async with serving(wrapped(manager, identify=broken)) as url:
            status, _, body = await refusal_of(client(url))
        assert status == 500
        assert b"key server" not in body
        assert "no key server" in caplog.text
        assert live(manager) == 0

    async def test_a_page_of_another_site_brings_no_cookies(self, manager: UserContextManager) -> None:
        headers = {"Cookie": "session=1", "Origin": "https://evil.example"}
        async with serving(wrapped(manager, allowed_origins=["https://app.example"])) as url:
            assert (await refusal_of(client(url, "alice", headers=headers)))[0] == 403
            async with client(url, "alice", headers={**headers, "Origin": "https://app.example"}):
                assert live(manager) == 1

    async def test_the_limit_of_a_user_is_a_429_and_the_others_are_let_in(self, make_manager: MakeManager) -> None:
        manager = make_manager(guard="open", max_connections_per_user=1)
        async with serving(wrapped(manager)) as url, client(url, "alice") as first:
            status, headers, _ = await refusal_of(client(url, "alice"))
            assert (status, headers["retry-after"]) == (429, "1")
            async with client(url, "bob"):
                assert live(manager) == 2
            await first.close()
            await eventually(lambda: live(manager) == 0, "all have gone")
            async with client(url, "alice"):
                assert live(manager) == 1


class TestWrapping:
    async def test_a_handler_without_its_connections_serves_nobody(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        handler, other = wrapped(manager), wrapped(manager)
        for create in (None, other.create_connection):
            async with serving(handler, create_connection=create) as url, client(url, "alice") as connection:
                assert (await ending_of(connection))[0] == 1011
        assert caplog.text.count("ConfigurationError") >= 2
        assert "create_connection=handler.create_connection" in caplog.text

    def test_the_wrong_server_serves_nobody(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        handler: Any = wrapped(manager)
        with pytest.raises(ConfigurationError, match=r"serve it with websockets\.asyncio\.server"):
            handler.create_connection(object(), object(), object())
        with pytest.raises(ConfigurationError, match="create_connection"):
            handler(object())

    async def test_an_object_that_is_called_like_an_asynchronous_function_is_one(
        self, manager: UserContextManager
    ) -> None:
        class Chat:
            async def __call__(self, connection: ServerConnection) -> None:
                await echo(connection)

        async with conversation(wrapped(manager, Chat())) as connection:
            await connection.send("hi")
            assert await connection.recv() == "alice: hi"

    @pytest.mark.parametrize(
        "settings",
        [{"max_message_size": 0}, {"message_rate": 0}, {"ttl": -1}, {"allowed_origins": "x"}, {"identify": None}],
        ids=str,
    )
    def test_settings_that_cannot_be_are_refused_at_once(
        self, manager: UserContextManager, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigurationError):
            wrapped(manager, **{"require_identity": True, **settings})


class TestOwnContext:
    async def test_nothing_that_was_set_elsewhere_is_seen(self, manager: UserContextManager) -> None:
        async def note(connection: ServerConnection) -> None:
            found = NOTE.get(), current_context().user_id
            NOTE.set(f"of {found[1]}")
            await connection.send(json.dumps(found))
            await connection.recv()

        def look(connection: HTTPConnection) -> str | None:
            assert NOTE.get() == "nothing"
            NOTE.set("by the resolver")
            return identify(connection)

        # The server inherits the Context that it is started in, and with it somebody else's context.
        with running_as(manager, "carol"):
            NOTE.set("of carol")
            async with (
                serving(wrapped(manager, note, identify=look)) as url,
                client(url, "alice") as alice,
                client(url, "bob") as bob,
            ):
                assert json.loads(await alice.recv()) == ["by the resolver", "alice"]
                assert json.loads(await bob.recv()) == ["by the resolver", "bob"]

    async def test_tasks_of_a_handler_are_in_its_context(self, manager: UserContextManager) -> None:
        async def say(connection: ServerConnection) -> None:
            await connection.send(current_context().user_id)

        async def handler(connection: ServerConnection) -> None:
            await asyncio.create_task(say(connection))

        async with conversation(wrapped(manager, handler)) as connection:
            assert await connection.recv() == "alice"


class Released:
    """A resource that says when it was let go of."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        await asyncio.sleep(0)
        self.errors.append(error)


class TestTheEnd:
    @pytest.mark.parametrize(
        "end", ["returns", "raises", "is cancelled", "client closes", "client vanishes", "close()"]
    )
    async def test_the_context_is_torn_down_before_the_server_is_closed(
        self, manager: UserContextManager, end: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        resource = Released()
        tasks: list[asyncio.Task[Any]] = []

        async def handler(connection: ServerConnection) -> None:
            await current_context().enter_async_context(resource)
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            await connection.send("ready")
            message = await connection.recv()
            if message == "raises":
                raise LookupError("not here")

        async with serving(wrapped(manager, handler)) as url:
            connection = await client(url, "alice")
            assert await connection.recv() == "ready"
            assert live(manager) == 1
            if end in ("returns", "raises"):
                await connection.send(end)
                assert (await ending_of(connection))[0] == {"returns": 1000, "raises": 1011}[end]
            elif end == "is cancelled":
                tasks[0].cancel()
                await ending_of(connection)
            elif end == "client closes":
                await connection.close()
            elif end == "client vanishes":
                connection.transport.abort()
            if end != "close()":
                await eventually(lambda: resource.errors, "it is released while the server goes on")
        await connection.close()
        assert live(manager) == 0
        [error] = resource.errors
        assert (error is None) == (end == "returns")
        [closed] = events(manager, "alice", "closed")
        expected = {"returns": "finished", "raises": "failed", "is cancelled": "cancelled"}
        assert closed["reason"] == expected.get(end, "disconnected")
        assert ("not here" in caplog.text) == (end == "raises")

    @pytest.mark.parametrize(
        ("raised", "code"),
        [
            (CrossUserAccessError("no"), 1008),
            (UnauthenticatedError("no"), 1008),
            (IdentityConflictError("no"), 1008),
            (ContextLimitError("user", 1, "wait"), 1013),
        ],
    )
    async def test_what_the_table_knows_closes_with_its_code(
        self, manager: UserContextManager, raised: Exception, code: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def handler(connection: ServerConnection) -> None:
            raise raised

        async with conversation(wrapped(manager, handler)) as connection:
            assert (await ending_of(connection))[0] == code
        assert "connection handler failed" not in caplog.text

    async def test_a_revoked_user_is_cut_off_wherever_the_handler_waits(self, manager: UserContextManager) -> None:
        cut: list[str] = []

        async def handler(connection: ServerConnection) -> None:
            if current_context().user_id == "bob":
                await until_closed(connection)
                return
            try:
                await forever(connection)
            except asyncio.CancelledError:
                cut.append("alice")
                with pytest.raises(ContextClosedError):
                    _ = current_context().agent_context
                raise

        async with (
            serving(wrapped(manager, handler)) as url,
            client(url, "alice") as alice,
            client(url, "bob") as bob,
        ):
            assert (await alice.recv(), await bob.recv()) == ("ready", "ready")
            assert manager.revoke("alice", "stolen") == 1
            assert await ending_of(alice) == (1008, "Valid credentials are required.")
            assert cut == ["alice"]
            await manager.send_event("bob", "hello")
            assert json.loads(await bob.recv())["type"] == "hello"

    async def test_an_expired_context_closes_its_connection(self, manager: UserContextManager) -> None:
        async with conversation(wrapped(manager, forever, ttl=0.05)) as connection:
            assert (await ending_of(connection))[0] == 1008
        await eventually(lambda: events(manager, "alice", "closed"), "it is on record")
        [closed] = events(manager, "alice", "closed")
        assert closed["reason"] == "expired"

    @pytest.mark.parametrize("then", ["send", "recv", "close"])
    async def test_a_handler_that_revokes_its_own_user_goes_no_further(
        self, manager: UserContextManager, then: str
    ) -> None:
        async def handler(connection: ServerConnection) -> None:
            manager.revoke("alice", "logged out")
            await (connection.send("more") if then == "send" else getattr(connection, then)())

        async with conversation(wrapped(manager, handler)) as connection:
            assert (await ending_of(connection))[0] == 1008

    async def test_drain_then_close_ends_what_is_open_and_lets_nobody_in(self, manager: UserContextManager) -> None:
        async def polite(connection: ServerConnection) -> None:
            await connection.send("ready")
            await connection.recv()

        async with serving(wrapped(manager, polite)) as url, client(url, "alice") as alice, client(url, "bob") as bob:
            await alice.recv()
            await bob.recv()
            draining = asyncio.create_task(manager.drain(0.5))
            await eventually(lambda: not manager.is_healthy(), "it drains")
            status, headers, _ = await refusal_of(client(url, "carol"))
            assert (status, headers["retry-after"]) == (503, "1")
            await alice.send("done")  # who ends in time is not interrupted
            assert (await ending_of(alice))[0] == 1000
            assert (await ending_of(bob))[0] == 1013
            assert await draining == 1
        assert live(manager) == 0

    async def test_closing_the_server_alone_says_that_it_goes_away(self, manager: UserContextManager) -> None:
        handler = wrapped(manager)
        server = await serve(handler, HOST, 0, create_connection=handler.create_connection)
        connection = await client(f"ws://{HOST}:{next(iter(server.sockets)).getsockname()[1]}", "alice")
        server.close()
        assert (await ending_of(connection))[0] == 1001
        await server.wait_closed()
        assert live(manager) == 0


class TestTheHandshake:
    """The context is open before the client has its answer: it must close too when nothing comes of it."""

    @pytest.fixture
    def handled(self) -> list[ServerConnection]:
        return []

    @pytest.fixture
    def handler(self, manager: UserContextManager, handled: list[ServerConnection]) -> AsyncioHandler:
        async def handler(connection: ServerConnection) -> None:
            handled.append(connection)

        return wrapped(manager, handler)

    async def settled(self, manager: UserContextManager, handled: list[ServerConnection], reason: str) -> None:
        await eventually(lambda: live(manager) == 0, "the context is closed")
        assert not handled
        await eventually(lambda: events(manager, "alice", "closed"), "it is on record")
        [closed] = events(manager, "alice", "closed")
        assert closed["reason"] == reason

    async def test_the_client_vanishes_while_process_request_waits(
        self, manager: UserContextManager, handler: AsyncioHandler, handled: list[ServerConnection]
    ) -> None:
        release = asyncio.Event()

        async def wait(connection: ServerConnection, request: Request) -> None:
            await release.wait()

        async with serving(handler, process_request=wait) as url:
            with raw(url, handshake(url, "alice")):
                await eventually(lambda: live(manager) == 1, "it is open")
            release.set()
            await self.settled(manager, handled, "disconnected")

    async def test_process_request_takes_too_long(
        self, manager: UserContextManager, handler: AsyncioHandler, handled: list[ServerConnection]
    ) -> None:
        async def wait(connection: ServerConnection, request: Request) -> None:
            await asyncio.Event().wait()

        async with serving(handler, process_request=wait, open_timeout=1) as url:
            with raw(url, handshake(url, "alice")):
                await eventually(lambda: live(manager) == 1, "it is open")
                await self.settled(manager, handled, "disconnected")

    async def test_the_resolver_takes_too_long(
        self, manager: UserContextManager, handled: list[ServerConnection]
    ) -> None:
        ended: list[str] = []

        async def slow(connection: HTTPConnection) -> str:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("resolver")
            return "alice"

        async with serving(wrapped(manager, identify=slow), open_timeout=1) as url:
            with raw(url, handshake(url, "alice")):
                await eventually(lambda: ended, "it is cancelled")
        assert live(manager) == 0

    @pytest.mark.parametrize(
        ("version", "more", "status"),
        [
            ("12", (), b"400"),
            ("13", ("Sec-WebSocket-Protocol: none of yours",), b"400"),
        ],
    )
    async def test_the_library_refuses_it_afterwards(
        self,
        manager: UserContextManager,
        handler: AsyncioHandler,
        handled: list[ServerConnection],
        version: str,
        more: tuple[str, ...],
        status: bytes,
    ) -> None:
        async with serving(handler, subprotocols=["chat"], close_timeout=0.1) as url:
            with raw(url, handshake(url, "alice", *more, version=version)) as bare:
                head = await asyncio.to_thread(read_head, bare)
                assert head.startswith(b"HTTP/1.1 " + status)
                await self.settled(manager, handled, "disconnected")

    async def test_process_response_refuses_it_afterwards(
        self, manager: UserContextManager, handler: AsyncioHandler, handled: list[ServerConnection]
    ) -> None:
        def refuse(connection: ServerConnection, request: Request, response: Response) -> Response:
            return connection.respond(418, "no tea")

        async with serving(handler, process_response=refuse) as url:
            assert (await refusal_of(client(url, "alice")))[0] == 418
            await self.settled(manager, handled, "disconnected")

    async def test_the_user_is_revoked_during_it(
        self, manager: UserContextManager, handler: AsyncioHandler, handled: list[ServerConnection]
    ) -> None:
        def revoke(connection: ServerConnection, request: Request) -> None:
            manager.revoke("alice", "just now")

        async with serving(handler, process_request=revoke) as url:
            assert (await refusal_of(client(url, "alice")))[0] == 401
            await self.settled(manager, handled, "revoked")

    async def test_a_user_revoked_between_the_answer_and_the_handler_is_closed_with_1008(
        self, manager: UserContextManager, handler: AsyncioHandler, handled: list[ServerConnection]
    ) -> None:
        def revoke(connection: ServerConnection, request: Request, response: Response) -> None:
            manager.revoke("alice", "just now")

        async with serving(handler, process_response=revoke) as url, client(url, "alice") as connection:
            assert (await ending_of(connection))[0] == 1008
            await self.settled(manager, handled, "revoked")


class TestProcessRequest:
    async def test_it_runs_in_the_context_of_who_was_identified(self, manager: UserContextManager) -> None:
        async def ask(connection: ServerConnection, request: Request) -> Response | None:
            NOTE.set("by process_request")
            if current_context().user_id != "alice":
                return connection.respond(403, "alice only")
            return None

        async def handler(connection: ServerConnection) -> None:
            await connection.send(NOTE.get())

        async with serving(wrapped(manager, handler), process_request=ask) as url:
            async with client(url, "alice") as connection:
                assert await connection.recv() == "by process_request"
            assert (await refusal_of(client(url, "bob")))[::2] == (403, b"alice only")
            assert live(manager) == 0

    async def test_it_is_not_asked_about_who_is_refused(self, manager: UserContextManager) -> None:
        asked: list[str] = []

        def ask(connection: ServerConnection, request: Request) -> None:
            asked.append(request.path)

        async with serving(wrapped(manager, require_identity=True), process_request=ask) as url:
            assert (await refusal_of(client(url)))[0] == 401
        assert not asked

    async def test_its_errors_are_answered_as_the_handlers_are(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        def ask(connection: ServerConnection, request: Request) -> None:
            raise CrossUserAccessError("not yours") if request.path == "/known" else LookupError("broken")

        async with serving(wrapped(manager), process_request=ask) as url:
            assert (await refusal_of(client(f"{url}/known", "alice")))[0] == 403
            assert (await refusal_of(client(url, "alice")))[0] == 500
        assert "broken" in caplog.text
        assert live(manager) == 0

    async def test_it_may_accept_by_itself(self, manager: UserContextManager) -> None:
        def accept(connection: ServerConnection, request: Request) -> Response:
            response = connection.protocol.accept(request)
            response.headers["X-Mark"] = "mine"
            return response

        async with serving(wrapped(manager), process_request=accept) as url, client(url, "alice") as connection:
            assert connection.response is not None
            assert connection.response.headers["x-mark"] == "mine"
            await connection.send("hi")
            assert await connection.recv() == "alice: hi"

    async def test_the_routers_handlers_are_served(self, manager: UserContextManager) -> None:
        async def room(connection: ServerConnection, number: int) -> None:
            await connection.send(f"{current_context().user_id} in room {number}")

        router = Router(Map([Rule("/rooms/<int:number>", endpoint=room)]))
        async with serving(wrapped(manager, router.handler), process_request=router.route_request) as url:
            async with client(f"{url}/rooms/7", "alice") as connection:
                assert await connection.recv() == "alice in room 7"
            assert (await refusal_of(client(f"{url}/attic", "alice")))[0] == 404
        assert live(manager) == 0


class TestEvents:
    async def test_they_reach_their_users_connections_in_order(self, manager: UserContextManager) -> None:
        async with (
            serving(wrapped(manager)) as url,
            client(url, "alice") as first,
            client(url, "alice") as second,
            client(url, "bob") as bob,
        ):
            await eventually(lambda: live(manager) == 3, "all are there")
            deliveries = [await manager.send_event("alice", "tick", number) for number in range(20)]
            assert [delivery.delivered for delivery in deliveries] == [2] * 20
            await asyncio.to_thread(manager.post_event, "bob", "tock")
            for connection in (first, second):
                assert [json.loads(await connection.recv())["data"] for _ in range(20)] == list(range(20))
            assert json.loads(await bob.recv())["type"] == "tock"

    async def test_what_was_missed_is_replayed(self, manager: UserContextManager) -> None:
        async with serving(wrapped(manager)) as url:
            async with client(url, "alice") as connection:
                await manager.send_event("alice", "tick", 1)
                seen = json.loads(await connection.recv())
            await eventually(lambda: live(manager) == 0, "it has gone")
            assert (await manager.send_event("alice", "tick", 2)).delivered == 0
            place = f"epoch={seen['epoch']}&last_sequence={seen['sequence']}"
            async with client(f"{url}?{place}", "alice") as again:
                assert json.loads(await again.recv())["data"] == 2
            async with client(f"{url}?epoch=other&last_sequence=9", "alice") as lost:
                assert json.loads(await lost.recv())["type"] == "events_missed"

    async def test_none_is_sent_once_the_handler_closes(self, manager: UserContextManager) -> None:
        async def handler(connection: ServerConnection) -> None:
            await connection.recv()
            await connection.close(4000, "enough")
            delivery = await manager.send_event("alice", "late")
            assert delivery.delivered == delivery.queued == len(delivery.dropped) == 0

        async with conversation(wrapped(manager, handler)) as connection:
            await connection.send("end")
            assert await ending_of(connection) == (4000, "enough")

    async def test_a_client_that_takes_nothing_delays_nobody_and_is_closed(self, make_manager: MakeManager) -> None:
        ledger = RecordingLedger()
        manager = make_manager(guard="open", ledger=ledger, events=EventPolicy(queue_events=8, queue_bytes=256 * 1024))
        async with serving(wrapped(manager, until_closed), close_timeout=0.2) as url, client(url, "bob") as bob:
            await bob.recv()
            with raw(url, handshake(url, "alice")) as stalled:
                await asyncio.to_thread(read_head, stalled)
                await eventually(lambda: live(manager) == 2, "it is there")
                data = "x" * 60_000
                for number in range(200):
                    await manager.send_event("alice", "tick", data)
                    assert (await manager.send_event("bob", "tick", number)).delivered == 1
                    assert json.loads(await bob.recv())["data"] == number
                await eventually(lambda: ledger.select("closed", user="alice"), "it is closed")
                assert live(manager) == 1
                await eventually(lambda: running() == 1, "the library has let go of it, though it took no close frame")
        [closed] = ledger.select("closed", user="alice")
        assert closed.reason == "slow"


def running() -> int:
    return sum(task.get_name() == "ucm-middleware connection" for task in asyncio.all_tasks())


class TestMessages:
    @pytest.mark.parametrize("how", ["recv", "iteration", "streaming"])
    @pytest.mark.parametrize("data", ["é" * 600, b"x" * 1001], ids=["text", "bytes"])
    async def test_one_that_is_too_big_closes_its_connection(
        self, manager: UserContextManager, how: str, data: str | bytes
    ) -> None:
        async def handler(connection: ServerConnection) -> None:
            if how == "recv":
                await connection.recv()
            elif how == "iteration":
                async for _ in connection:
                    pass
            else:
                async for _ in connection.recv_streaming():
                    pass

        async with (
            serving(wrapped(manager, handler, max_message_size=1000)) as url,
            client(url, "alice") as alice,
            client(url, "bob") as bob,
        ):
            await alice.send(data)
            assert (await ending_of(alice))[0] == 1009
            await bob.send("x" * 1000)
            await bob.close()
            assert bob.close_code == 1000

    async def test_fragments_are_counted_together(self, manager: UserContextManager) -> None:
        received: list[str] = []

        async def handler(connection: ServerConnection) -> None:
            async for fragment in connection.recv_streaming():
                received.append(str(fragment))

        async with conversation(wrapped(manager, handler, max_message_size=1000)) as connection:
            await connection.send(["x" * 600, "y" * 600])
            assert (await ending_of(connection))[0] == 1009
        assert sum(map(len, received)) <= 1000

    async def test_the_servers_own_limit_holds_too(self, manager: UserContextManager) -> None:
        async with conversation(wrapped(manager), max_size=10) as connection:
            await connection.send("x" * 11)
            assert (await ending_of(connection))[0] == 1009

    async def test_too_many_close_the_connection(self, manager: UserContextManager) -> None:
        async with conversation(wrapped(manager, message_rate=1)) as connection:
            for _ in range(6):
                await connection.send("hi")
            assert await ending_of(connection) == (1008, "Too many messages.")

    async def test_they_come_as_the_handler_asks_for_them(self, manager: UserContextManager) -> None:
        async def handler(connection: ServerConnection) -> None:
            received = [await connection.recv(decode=False), await connection.recv(decode=True)]
            received += [fragment async for fragment in connection.recv_streaming(decode=False)]
            received.append(await connection.recv())
            await connection.send(repr(received))

        async with conversation(wrapped(manager, handler)) as connection:
            await connection.send("text")
            await connection.send(b"bytes")
            await connection.send(["a", "b"])
            await connection.send(b"end")
            assert await connection.recv() == repr([b"text", "bytes", b"a", b"b", b"", b"end"])

    async def test_each_may_have_a_child_context(self, manager: UserContextManager) -> None:
        children: list[UserExecutionContext] = []

        async def handler(connection: ServerConnection) -> None:
            outer = current_context()
            async for message in connection:
                context = current_context()
                assert context.parent_request_id == outer.request_id
                assert "seen" not in context.agent_context
                context.agent_context["seen"] = message
                children.append(context)
                assert [child.is_open for child in children] == [False] * (len(children) - 1) + [True]
                await connection.send(context.user_id)

        async with conversation(wrapped(manager, handler, context_per_message=True)) as connection:
            for _ in range(3):
                await connection.send("hi")
                assert await connection.recv() == "alice"
        assert not children[-1].is_open
        assert len({child.request_id for child in children}) == 3

    async def test_plugins_wrap_contexts_and_messages(self, make_manager: MakeManager) -> None:
        story: list[str] = []

        @asynccontextmanager
        async def wrapping(name: str) -> AsyncIterator[None]:
            story.append(f"+{name}")
            yield
            story.append(f"-{name}")

        class Plugin:
            @hookimpl
            def ucm_around_context(self, context: UserExecutionContext) -> Any:
                return wrapping("context")

            @hookimpl
            def ucm_around_message(self, context: UserExecutionContext, message: Message) -> Any:
                return wrapping(message["text"])

        manager = make_manager(guard="open", plugins=[Plugin()])
        async with conversation(wrapped(manager)) as connection:
            for text in ("one", "two"):
                await connection.send(text)
                await connection.recv()
        assert story == ["+context", "+one", "-one", "+two", "-two", "-context"]

    @pytest.mark.parametrize("name", BAD_FRAMES)
    async def test_a_malformed_frame_takes_down_nothing_but_its_connection(
        self, manager: UserContextManager, name: str
    ) -> None:
        async with serving(wrapped(manager)) as url, client(url, "bob") as bob:
            with raw(url, handshake(url, "alice")) as bare:
                await asyncio.to_thread(read_head, bare)
                await eventually(lambda: live(manager) == 2, "it is there")
                bare.sendall(BAD_FRAMES[name])
                rest = await asyncio.to_thread(bare.recv, 1000)
                assert rest[:1] == b"\x88"
                assert int.from_bytes(rest[2:4], "big") in (1002, 1007, 1009)
            await eventually(lambda: live(manager) == 1, "its context is closed")
            await bob.send("hi")
            assert await bob.recv() == "bob: hi"


class TestRecords:
    @pytest.fixture
    def diary(self) -> Diary:
        return Diary()

    @pytest.fixture
    def strict(self, make_manager: MakeManager, diary: Diary) -> UserContextManager:
        return make_manager(guard="open", ledger=diary, audit="strict")

    async def test_the_opening_is_durable_before_the_handler_and_the_outcome_before_the_close(
        self, strict: UserContextManager, diary: Diary
    ) -> None:
        async def handler(connection: ServerConnection) -> None:
            diary.story.append("handler")
            await connection.recv()
            await connection.close(4000)
            diary.story.append("closed by the handler")

        async with conversation(wrapped(strict, handler)) as connection:
            await connection.send("end")
            assert (await ending_of(connection))[0] == 4000
        expected = ["opened", "durable", "handler", "answered", "durable", "closed by the handler", "closed"]
        assert diary.story[: len(expected)] == expected

    async def test_who_cannot_be_recorded_is_refused_with_503(self, strict: UserContextManager, diary: Diary) -> None:
        diary.fails_at = "opened"
        async with serving(wrapped(strict)) as url:
            status, headers, _ = await refusal_of(client(url, "alice"))
        assert (status, headers["retry-after"]) == (503, "1")
        assert live(strict) == 0

    @pytest.mark.parametrize("closes", ["handler", "server"])
    async def test_an_outcome_that_cannot_be_recorded_is_told(
        self, strict: UserContextManager, diary: Diary, closes: str
    ) -> None:
        async def handler(connection: ServerConnection) -> None:
            await connection.send("ready")
            if closes == "server":
                await connection.recv()
            diary.fails_at = "answered"

        diary.fails_at = "answered" if closes == "server" else None
        async with serving(wrapped(strict, handler)) as url:
            connection = await client(url, "alice")
            await connection.recv()
            if closes == "handler":
                assert (await ending_of(connection))[0] == 1013
        if closes == "server":
            assert (await ending_of(connection))[0] == 1013
        assert live(strict) == 0

    async def test_the_span_of_the_connection_ends_when_it_is_accepted(self, make_manager: MakeManager) -> None:
        with installed(Sdk()) as sdk:
            manager = make_manager(guard="open")
            async with conversation(wrapped(manager)) as connection:
                await connection.send("hi")
                await connection.recv()
                assert about(sdk.one("ucm connection"))["ucm.event"] == "opened"
            message, close = sdk.one("ucm message"), sdk.one("ucm close")
            context = sdk.one("ucm connection").context
            assert context is not None
            for span in (message, close):
                assert [link.context.span_id for link in span.links] == [context.span_id]


async def test_a_handshake_that_fails_for_the_client_leaves_nothing(manager: UserContextManager) -> None:
    """What a client gives up on by itself, after the server's answer."""

    async def handler(connection: ServerConnection) -> None:
        with pytest.raises(ConnectionClosed):
            await connection.recv()

    async with serving(wrapped(manager, handler)) as url:
        for _ in range(20):
            with raw(url, handshake(url, "alice")):
                pass
        await eventually(lambda: live(manager) == 0, "all have gone")
