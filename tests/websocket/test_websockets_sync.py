"""Handlers of websockets.sync.server, each in its thread, served and called by the library itself over loopback."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from websockets.exceptions import ConnectionClosed, InvalidMessage
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection
from websockets.sync.router import Router
from websockets.sync.server import ServerConnection
from werkzeug.routing import Map, Rule

from support.contexts import MakeManager, events, running_as
from support.library import (
    BAD_FRAMES,
    Diary,
    handshake,
    identify,
    raw,
    read_head,
    serving_threads,
    sync_client,
    sync_ending_of,
    sync_refusal_of,
)
from support.tracing import Sdk, about, installed
from support.waiting import PATIENCE, wait_until
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
from ucm_middleware.audit import Row
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.websocket.websockets import wrap_handler
from ucm_middleware.websocket.websockets.sync_server import SyncHandler

NOTE: ContextVar[str] = ContextVar("note", default="nothing")


@pytest.fixture
def manager(make_manager: MakeManager) -> UserContextManager:
    return make_manager(guard="open")


def live(manager: UserContextManager) -> int:
    return len(manager.get_active_contexts())


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(f"{current_context().user_id}: {message!s}")


def until_closed(connection: ServerConnection) -> None:
    connection.send("ready")
    connection.wait_closed()


def wrapped(
    manager: UserContextManager, handler: Callable[[ServerConnection], None] = echo, **settings: Any
) -> SyncHandler:
    settings.setdefault("identify", identify)
    return wrap_handler(handler, manager=manager, **settings)


@contextmanager
def conversation(handler: SyncHandler, user: str = "alice", **options: Any) -> Iterator[ClientConnection]:
    with serving_threads(handler, **options) as url, sync_client(url, user) as connection:
        yield connection


class TestIdentity:
    def test_the_handler_runs_for_whom_the_resolver_found(self, manager: UserContextManager) -> None:
        with (
            serving_threads(wrapped(manager)) as url,
            sync_client(url, "alice") as alice,
            sync_client(url, "bob") as bob,
        ):
            alice.send("hi")
            bob.send(b"hi")
            assert (alice.recv(PATIENCE), bob.recv(PATIENCE)) == ("alice: hi", "bob: b'hi'")
            assert live(manager) == 2
        assert live(manager) == 0

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
    def test_a_refusal_is_a_status_and_not_a_closed_connection(
        self, manager: UserContextManager, raised: Exception, status: int
    ) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise raised

        handled: list[ServerConnection] = []
        with serving_threads(wrapped(manager, handled.append, identify=refuse)) as url:
            found, headers, body = sync_refusal_of(url)
        assert found == status
        assert set(body) == {"detail"}
        assert (headers["cache-control"], headers["connection"]) == ("no-store", "close")
        assert ("retry-after" in headers) == (status == 429)
        assert ("www-authenticate" in headers) == (status == 401)
        assert not handled
        assert live(manager) == 0

    def test_nobody_and_bad_ids_are_refused(self, manager: UserContextManager) -> None:
        with serving_threads(wrapped(manager, require_identity=True)) as url:
            assert sync_refusal_of(url)[0] == 401
            assert sync_refusal_of(url, "a\tb")[0] == 400
        [first, _] = manager.get_system_trail()
        assert (first["event"], first["outcome"]) == ("refused", "denied")

    def test_nobody_is_anonymous_and_may_be_bound(self, manager: UserContextManager) -> None:
        def log_in(connection: ServerConnection) -> None:
            current_context().bind(str(connection.recv()))
            manager.post_event("alice", "hello")
            connection.recv()

        with serving_threads(wrapped(manager, log_in)) as url, sync_client(url) as connection:
            connection.send("alice")
            assert json.loads(connection.recv(PATIENCE))["type"] == "hello"

    def test_credentials_that_end_end_the_connection(self, manager: UserContextManager) -> None:
        def soon(connection: HTTPConnection) -> Principal:
            return Principal("alice", datetime.now(UTC) + timedelta(seconds=0.2))

        with conversation(wrapped(manager, until_closed, identify=soon)) as connection:
            assert sync_ending_of(connection)[0] == 1008
        wait_until(lambda: bool(events(manager, "alice", "closed")), "it is closed")
        [closed] = events(manager, "alice", "closed")
        assert closed["reason"] == "expired"

    def test_an_asynchronous_resolver_that_has_nothing_to_wait_for_will_do(self, manager: UserContextManager) -> None:
        identifying = bearer_token({"good": "alice"}.get)
        with serving_threads(wrapped(manager, identify=identifying, require_identity=True)) as url:
            assert sync_refusal_of(url, headers={"Authorization": "Bearer bad"})[0] == 401
            with sync_client(url, headers={"Authorization": "Bearer good"}) as connection:
                connection.send("hi")
                assert connection.recv(PATIENCE) == "alice: hi"

    def test_one_that_waits_lets_nobody_in(self, manager: UserContextManager, caplog: pytest.LogCaptureFixture) -> None:
        class Forever:
            def __await__(self) -> Any:
                yield

        async def slow(connection: HTTPConnection) -> str:
            await Forever()
            return "alice"

        with serving_threads(wrapped(manager, identify=slow)) as url:
            assert sync_refusal_of(url)[0] == 500
        assert "identify waits for something" in caplog.text
        assert live(manager) == 0

    def test_a_plugin_may_identify(self, make_manager: MakeManager) -> None:
        class Plugin:
            @hookimpl
            def ucm_identify(self, connection: HTTPConnection) -> str | None:
                return connection.headers.get("x-user")

        manager = make_manager(guard="open", plugins=[Plugin()])
        with conversation(wrap_handler(echo, manager=manager, require_identity=True)) as connection:
            connection.send("hi")
            assert connection.recv(PATIENCE) == "alice: hi"

    @pytest.mark.parametrize("hook", ["ucm_around_context", "ucm_around_message"])
    def test_plugins_that_need_an_event_loop_are_refused_at_once(self, make_manager: MakeManager, hook: str) -> None:
        class Around:
            @hookimpl
            def ucm_around_context(self, context: UserExecutionContext) -> None: ...

        class AroundMessage:
            @hookimpl
            def ucm_around_message(self, context: UserExecutionContext) -> None: ...

        plugin = Around() if hook == "ucm_around_context" else AroundMessage()
        with pytest.raises(ConfigurationError, match=f"{hook} of .* needs an event loop"):
            wrapped(make_manager(plugins=[plugin]))

    def test_a_page_of_another_site_brings_no_cookies(self, manager: UserContextManager) -> None:
        headers = {"Cookie": "session=1", "Origin": "https://evil.example"}
        with serving_threads(wrapped(manager, allowed_origins=["https://app.example"])) as url:
            assert sync_refusal_of(url, "alice", headers=headers)[0] == 403
            with sync_client(url, "alice", headers={**headers, "Origin": "https://app.example"}):
                assert live(manager) == 1

    def test_the_limit_of_a_user_is_a_429_and_the_others_are_let_in(self, make_manager: MakeManager) -> None:
        manager = make_manager(guard="open", max_connections_per_user=1)
        with serving_threads(wrapped(manager)) as url, sync_client(url, "alice") as first:
            status, headers, _ = sync_refusal_of(url, "alice")
            assert (status, headers["retry-after"]) == (429, "1")
            with sync_client(url, "bob"):
                assert live(manager) == 2
            first.close()
            wait_until(lambda: live(manager) == 0, "all have gone")
            with sync_client(url, "alice"):
                assert live(manager) == 1


class TestWrapping:
    def test_a_handler_without_its_connections_serves_nobody(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        handler, other = wrapped(manager), wrapped(manager)
        for create in (None, other.create_connection):
            with serving_threads(handler, create_connection=create) as url, sync_client(url, "alice") as connection:
                assert sync_ending_of(connection)[0] == 1011
        assert "create_connection=handler.create_connection" in caplog.text

    def test_the_wrong_server_serves_nobody(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def asynchronous(connection: Any) -> None: ...

        handler: Any = wrap_handler(asynchronous, manager=manager)
        with serving_threads(handler) as url, pytest.raises((ConnectionClosed, InvalidMessage, OSError)):
            sync_client(url, legacy=True)
        assert "the handler is asynchronous: serve it with websockets.asyncio.server" in caplog.text


class TestOwnContext:
    def test_nothing_that_was_set_elsewhere_is_seen(self, manager: UserContextManager) -> None:
        def note(connection: ServerConnection) -> None:
            found = NOTE.get(), current_context().user_id
            NOTE.set(f"of {found[1]}")
            connection.send(json.dumps(found))
            connection.recv()

        def look(connection: HTTPConnection) -> str | None:
            assert NOTE.get() == "nothing"
            NOTE.set("by the resolver")
            return identify(connection)

        with running_as(manager, "carol"):
            NOTE.set("of carol")
            with (
                serving_threads(wrapped(manager, note, identify=look)) as url,
                sync_client(url, "alice") as alice,
                sync_client(url, "bob") as bob,
            ):
                assert json.loads(alice.recv(PATIENCE)) == ["by the resolver", "alice"]
                assert json.loads(bob.recv(PATIENCE)) == ["by the resolver", "bob"]
            assert NOTE.get() == "of carol"


class Resource:
    """Says in which thread, and with which error, it was let go of."""

    def __init__(self) -> None:
        self.exits: list[tuple[int, BaseException | None]] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.exits.append((threading.get_ident(), error))


class TestTheEnd:
    @pytest.mark.parametrize("end", ["returns", "raises", "client closes", "client vanishes", "shutdown()"])
    def test_the_context_is_torn_down_before_the_server_is_closed(
        self, manager: UserContextManager, end: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        resource = Resource()

        def handler(connection: ServerConnection) -> None:
            current_context().enter_context(resource)
            connection.send("ready")
            if connection.recv() == "raises":
                raise LookupError("not here")

        with serving_threads(wrapped(manager, handler)) as url:
            connection = sync_client(url, "alice", legacy=True)
            assert connection.recv(PATIENCE) == "ready"
            assert live(manager) == 1
            if end in ("returns", "raises"):
                connection.send(end)
                assert sync_ending_of(connection)[0] == {"returns": 1000, "raises": 1011}[end]
            elif end == "client closes":
                connection.close()
            elif end == "client vanishes":
                connection.socket.shutdown(socket.SHUT_RDWR)
            if end != "shutdown()":
                wait_until(lambda: bool(resource.exits), "it is released while the server goes on")
        connection.close()
        assert live(manager) == 0
        [(_, error)] = resource.exits
        assert (error is None) == (end == "returns")
        [closed] = events(manager, "alice", "closed")
        assert closed["reason"] == {"returns": "finished", "raises": "failed"}.get(end, "disconnected")
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
    def test_what_the_table_knows_closes_with_its_code(
        self, manager: UserContextManager, raised: Exception, code: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        def handler(connection: ServerConnection) -> None:
            raise raised

        with conversation(wrapped(manager, handler)) as connection:
            assert sync_ending_of(connection)[0] == code
        assert "connection handler failed" not in caplog.text

    @pytest.mark.parametrize("waits", ["for its client", "for something else"])
    def test_a_revoked_user_is_cut_off_and_the_context_refused(self, manager: UserContextManager, waits: str) -> None:
        """The connection is closed at once. What the context holds is released once the handler has let go of it."""
        resource, go_on, refused = Resource(), threading.Event(), threading.Event()
        released_too_soon: list[bool] = []

        def handler(connection: ServerConnection) -> None:
            context = current_context()
            if context.user_id == "bob":
                until_closed(connection)
                return
            context.enter_context(resource)
            connection.send("ready")
            if waits == "for something else":
                assert go_on.wait(PATIENCE)
                with pytest.raises(ContextClosedError):
                    _ = context.agent_context
                refused.set()
            try:
                connection.recv()
            finally:
                released_too_soon.append(bool(resource.exits))

        with (
            serving_threads(wrapped(manager, handler)) as url,
            sync_client(url, "alice") as alice,
            sync_client(url, "bob") as bob,
        ):
            assert (alice.recv(PATIENCE), bob.recv(PATIENCE)) == ("ready", "ready")
            assert manager.revoke("alice", "stolen") == 1
            assert sync_ending_of(alice) == (1008, "Valid credentials are required.")
            if waits == "for something else":
                assert not resource.exits
                go_on.set()
                assert refused.wait(PATIENCE)
            wait_until(lambda: bool(resource.exits), "it is released")
            assert released_too_soon == [False]
            assert len(resource.exits) == 1
            assert isinstance(resource.exits[0][1], Exception)
            manager.post_event("bob", "hello")
            assert json.loads(bob.recv(PATIENCE))["type"] == "hello"

    def test_who_revokes_does_not_release_what_a_handler_held_that_ended_meanwhile(
        self, make_manager: MakeManager
    ) -> None:
        resource, ended = Resource(), threading.Event()

        class SlowLedger(RecordingLedger):
            def append(self, row: Row) -> None:
                super().append(row)
                if self.records[-1].event == "revoked" and self.records[-1].context_id is not None:
                    assert ended.wait(PATIENCE)  # the connection is closed by now, and its handler ends

        def handler(connection: ServerConnection) -> None:
            current_context().enter_context(resource)
            connection.send("ready")
            connection.recv()

        class Served(SyncHandler):
            def __call__(self, connection: ServerConnection) -> None:
                super().__call__(connection)
                ended.set()

        manager = make_manager(guard="open", ledger=SlowLedger())
        with conversation(Served(handler, manager=manager, identify=identify)) as connection:
            assert connection.recv(PATIENCE) == "ready"
            assert manager.revoke("alice", "stolen") == 1
            assert ended.is_set()
            wait_until(lambda: bool(resource.exits), "it is released")
        [(thread, error)] = resource.exits
        assert thread != threading.get_ident()
        assert isinstance(error, ContextClosedError)

    def test_a_thread_that_does_not_end_keeps_nothing_for_long(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ucm_middleware.teardown.HANDLER_GRACE", 0.05)
        resource, go_on = Resource(), threading.Event()

        def handler(connection: ServerConnection) -> None:
            current_context().enter_context(resource)
            connection.send("ready")
            assert go_on.wait(PATIENCE)

        with conversation(wrapped(manager, handler)) as connection:
            connection.recv(PATIENCE)
            manager.revoke("alice", "stolen")
            wait_until(lambda: bool(resource.exits), "it is released")
            go_on.set()
        assert len(resource.exits) == 1

    @pytest.mark.parametrize("then", ["send", "recv", "close"])
    def test_a_handler_that_revokes_its_own_user_goes_no_further(self, manager: UserContextManager, then: str) -> None:
        def handler(connection: ServerConnection) -> None:
            manager.revoke("alice", "logged out")
            if then == "close":
                connection.close(1008)
                return
            with pytest.raises(ContextClosedError):
                if then == "send":
                    connection.send("more")
                else:
                    connection.recv()
            current_context()

        with conversation(wrapped(manager, handler)) as connection:
            assert sync_ending_of(connection)[0] == 1008

    def test_drain_then_shutdown_ends_what_is_open_and_lets_nobody_in(self, manager: UserContextManager) -> None:
        def polite(connection: ServerConnection) -> None:
            connection.send("ready")
            connection.recv()

        with (
            serving_threads(wrapped(manager, polite)) as url,
            sync_client(url, "alice") as alice,
            sync_client(url, "bob") as bob,
        ):
            alice.recv(PATIENCE)
            bob.recv(PATIENCE)
            drained: list[int] = []
            draining = threading.Thread(target=lambda: drained.append(asyncio.run(manager.drain(0.5))))
            draining.start()
            wait_until(lambda: not manager.is_healthy(), "it drains")
            status, headers, _ = sync_refusal_of(url, "carol")
            assert (status, headers["retry-after"]) == (503, "1")
            alice.send("done")
            assert sync_ending_of(alice)[0] == 1000
            assert sync_ending_of(bob)[0] == 1013
            draining.join(PATIENCE)
            assert drained == [1]
            assert live(manager) == 0


class TestTheHandshake:
    @pytest.fixture
    def handled(self) -> list[ServerConnection]:
        return []

    @pytest.fixture
    def handler(self, manager: UserContextManager, handled: list[ServerConnection]) -> SyncHandler:
        def handler(connection: ServerConnection) -> None:
            handled.append(connection)

        return wrapped(manager, handler)

    def settled(self, manager: UserContextManager, handled: list[ServerConnection], reason: str) -> None:
        wait_until(lambda: live(manager) == 0, "the context is closed")
        assert not handled
        wait_until(lambda: bool(events(manager, "alice", "closed")), "it is on record")
        [closed] = events(manager, "alice", "closed")
        assert closed["reason"] == reason

    def test_the_client_vanishes_while_process_request_waits(
        self, manager: UserContextManager, handler: SyncHandler, handled: list[ServerConnection]
    ) -> None:
        def wait(connection: ServerConnection, request: Request) -> None:
            connection.wait_closed(PATIENCE)

        with serving_threads(handler, process_request=wait) as url:
            with raw(url, handshake(url, "alice")):
                wait_until(lambda: live(manager) == 1, "it is open")
            self.settled(manager, handled, "disconnected")

    @pytest.mark.parametrize(("version", "more"), [("12", ()), ("13", ("Sec-WebSocket-Protocol: none of yours",))])
    def test_the_library_refuses_it_afterwards(
        self,
        manager: UserContextManager,
        handler: SyncHandler,
        handled: list[ServerConnection],
        version: str,
        more: tuple[str, ...],
    ) -> None:
        with (
            serving_threads(handler, subprotocols=["chat"], close_timeout=0.1) as url,
            raw(url, handshake(url, "alice", *more, version=version)) as bare,
        ):
            assert read_head(bare).startswith(b"HTTP/1.1 400")
            self.settled(manager, handled, "disconnected")

    def test_process_response_refuses_it_afterwards(
        self, manager: UserContextManager, handler: SyncHandler, handled: list[ServerConnection]
    ) -> None:
        def refuse(connection: ServerConnection, request: Request, response: Response) -> Response:
            return connection.respond(418, "no tea")

        with serving_threads(handler, process_response=refuse) as url:
            assert sync_refusal_of(url, "alice")[0] == 418
            self.settled(manager, handled, "disconnected")

    def test_a_user_revoked_between_the_answer_and_the_handler_is_closed_with_1008(
        self, manager: UserContextManager, handler: SyncHandler, handled: list[ServerConnection]
    ) -> None:
        def revoke(connection: ServerConnection, request: Request, response: Response) -> None:
            manager.revoke("alice", "just now")

        with serving_threads(handler, process_response=revoke) as url, sync_client(url, "alice") as connection:
            assert sync_ending_of(connection)[0] == 1008
            self.settled(manager, handled, "revoked")

    def test_what_a_client_gives_up_on_leaves_nothing(self, manager: UserContextManager) -> None:
        with serving_threads(wrapped(manager)) as url:
            for _ in range(20):
                with raw(url, handshake(url, "alice")):
                    pass
            wait_until(lambda: live(manager) == 0, "all have gone")


class TestProcessRequest:
    def test_it_runs_in_the_context_of_who_was_identified(self, manager: UserContextManager) -> None:
        def ask(connection: ServerConnection, request: Request) -> Response | None:
            NOTE.set("by process_request")
            return None if current_context().user_id == "alice" else connection.respond(403, "alice only")

        def handler(connection: ServerConnection) -> None:
            connection.send(NOTE.get())

        with serving_threads(wrapped(manager, handler), process_request=ask) as url:
            with sync_client(url, "alice") as connection:
                assert connection.recv(PATIENCE) == "by process_request"
            assert sync_refusal_of(url, "bob")[::2] == (403, b"alice only")
            wait_until(lambda: live(manager) == 0, "both have gone")
        assert events(manager, "bob", "closed")[0]["reason"] == "finished"

    def test_its_errors_are_answered_as_the_handlers_are(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        def ask(connection: ServerConnection, request: Request) -> None:
            raise CrossUserAccessError("not yours") if request.path == "/known" else LookupError("broken")

        with serving_threads(wrapped(manager), process_request=ask) as url:
            assert sync_refusal_of(f"{url}/known", "alice")[0] == 403
            assert sync_refusal_of(url, "alice")[0] == 500
        assert "broken" in caplog.text
        assert live(manager) == 0

    def test_the_routers_handlers_are_served(self, manager: UserContextManager) -> None:
        def room(connection: ServerConnection, number: int) -> None:
            connection.send(f"{current_context().user_id} in room {number}")

        router = Router(Map([Rule("/rooms/<int:number>", endpoint=room)]))
        with serving_threads(wrapped(manager, router.handler), process_request=router.route_request) as url:
            with sync_client(f"{url}/rooms/7", "alice") as connection:
                assert connection.recv(PATIENCE) == "alice in room 7"
            assert sync_refusal_of(f"{url}/attic", "alice")[0] == 404


class TestEvents:
    async def test_they_reach_their_users_connections_in_order(self, manager: UserContextManager) -> None:
        def talk(url: str) -> None:
            with (
                sync_client(url, "alice") as first,
                sync_client(url, "alice") as second,
                sync_client(url, "bob") as bob,
            ):
                for connection in (first, second, bob):  # they have joined
                    connection.send("hi")
                    connection.recv(PATIENCE)
                asyncio.run_coroutine_threadsafe(manager.send_event("alice", "tick", 0), loop).result(PATIENCE)
                for number in range(1, 20):
                    manager.post_event("alice", "tick", number)
                manager.post_event("bob", "tock")
                for connection in (first, second):
                    received = [json.loads(connection.recv(PATIENCE))["data"] for _ in range(20)]
                    assert received == list(range(20))
                assert json.loads(bob.recv(PATIENCE))["type"] == "tock"

        loop = asyncio.get_running_loop()
        with serving_threads(wrapped(manager)) as url:
            await asyncio.to_thread(talk, url)

    def test_what_was_missed_is_replayed(self, manager: UserContextManager) -> None:
        with serving_threads(wrapped(manager)) as url:
            with sync_client(url, "alice") as connection:
                connection.send("hi")
                connection.recv(PATIENCE)
                manager.post_event("alice", "tick", 1)
                seen = json.loads(connection.recv(PATIENCE))
            wait_until(lambda: live(manager) == 0, "it has gone")
            assert manager.post_event("alice", "tick", 2).queued == 0
            place = f"epoch={seen['epoch']}&last_sequence={seen['sequence']}"
            with sync_client(f"{url}?{place}", "alice") as again:
                assert json.loads(again.recv(PATIENCE))["data"] == 2
            with sync_client(f"{url}?epoch=other&last_sequence=9", "alice") as lost:
                assert json.loads(lost.recv(PATIENCE))["type"] == "events_missed"

    def test_none_is_sent_once_the_handler_closes(self, manager: UserContextManager) -> None:
        def handler(connection: ServerConnection) -> None:
            connection.recv()
            connection.close(4000, "enough")
            delivery = manager.post_event("alice", "late")
            assert delivery.delivered == delivery.queued == len(delivery.dropped) == 0

        with conversation(wrapped(manager, handler)) as connection:
            connection.send("end")
            assert sync_ending_of(connection) == (4000, "enough")

    def test_one_does_not_come_in_the_middle_of_a_message_in_fragments(self, manager: UserContextManager) -> None:
        def handler(connection: ServerConnection) -> None:
            def fragments() -> Iterator[str]:
                yield "a"
                manager.post_event("alice", "tick")
                yield "b"

            connection.send(fragments())
            connection.recv()

        with conversation(wrapped(manager, handler)) as connection:
            assert connection.recv(PATIENCE) == "ab"
            assert json.loads(connection.recv(PATIENCE))["type"] == "tick"

    @pytest.mark.parametrize("handler_sends", [False, True])
    def test_a_client_that_takes_nothing_delays_nobody_and_is_closed(
        self, make_manager: MakeManager, handler_sends: bool
    ) -> None:
        ledger = RecordingLedger()
        manager = make_manager(guard="open", ledger=ledger, events=EventPolicy(queue_events=8, queue_bytes=512 * 1024))
        resource, blocked = Resource(), threading.Event()
        ended: list[bool] = []

        def handler(connection: ServerConnection) -> None:
            if current_context().user_id == "bob":
                until_closed(connection)
                return
            current_context().enter_context(resource)
            try:
                while handler_sends:
                    blocked.set()
                    connection.send(b"x" * 1_000_000)
                connection.wait_closed()
            finally:
                ended.append(not resource.exits)

        with serving_threads(wrapped(manager, handler), close_timeout=0.2) as url, sync_client(url, "bob") as bob:
            bob.recv(PATIENCE)
            with raw(url, handshake(url, "alice")) as stalled:
                read_head(stalled)
                wait_until(lambda: live(manager) == 2, "it is there")
                if handler_sends:
                    assert blocked.wait(PATIENCE)
                for number in range(200):
                    manager.post_event("alice", "tick", "x" * 60_000)
                    manager.post_event("bob", "tick", number)
                    assert json.loads(bob.recv(PATIENCE))["data"] == number
                wait_until(lambda: bool(resource.exits), "it is released")
                assert live(manager) == 1
        # The handler came to its end, though nothing could be sent; who sends does no work of another's.
        assert ended == [True]
        [(thread, _)] = resource.exits
        assert thread != threading.get_ident()
        [closed] = ledger.select("closed", user="alice")
        assert closed.reason == "slow"


class TestMessages:
    @pytest.mark.parametrize("how", ["recv", "iteration", "streaming"])
    @pytest.mark.parametrize("data", ["é" * 600, b"x" * 1001], ids=["text", "bytes"])
    def test_one_that_is_too_big_closes_its_connection(
        self, manager: UserContextManager, how: str, data: str | bytes
    ) -> None:
        def handler(connection: ServerConnection) -> None:
            if how == "recv":
                connection.recv()
            else:
                list(connection if how == "iteration" else connection.recv_streaming())

        with (
            serving_threads(wrapped(manager, handler, max_message_size=1000)) as url,
            sync_client(url, "alice") as alice,
            sync_client(url, "bob") as bob,
        ):
            alice.send(data)
            assert sync_ending_of(alice)[0] == 1009
            bob.send("x" * 1000)
            bob.close()
            assert bob.close_code == 1000

    @pytest.mark.parametrize("streaming", [False, True])
    def test_too_many_close_the_connection(self, manager: UserContextManager, streaming: bool) -> None:
        def handler(connection: ServerConnection) -> None:
            while True:
                if streaming:
                    list(connection.recv_streaming())
                else:
                    connection.recv()

        with conversation(wrapped(manager, handler, message_rate=1)) as connection:
            for _ in range(6):
                connection.send("hi")
            assert sync_ending_of(connection) == (1008, "Too many messages.")

    def test_they_come_as_the_handler_asks_for_them(self, manager: UserContextManager) -> None:
        def handler(connection: ServerConnection) -> None:
            with pytest.raises(TimeoutError):
                connection.recv(timeout=0)
            connection.send("ready")
            received = [connection.recv(decode=False), connection.recv(PATIENCE, decode=True)]
            received += connection.recv_streaming(decode=False)
            received.append(connection.recv())
            connection.send(repr(received))

        with conversation(wrapped(manager, handler)) as connection:
            connection.recv(PATIENCE)
            connection.send("text")
            connection.send(b"bytes")
            connection.send(["a", "b"])
            connection.send(b"end")
            assert connection.recv(PATIENCE) == repr([b"text", "bytes", b"a", b"b", b"", b"end"])

    def test_each_may_have_a_child_context(self, manager: UserContextManager) -> None:
        children: list[UserExecutionContext] = []

        def handler(connection: ServerConnection) -> None:
            outer = current_context()
            for message in connection:
                context = current_context()
                assert context.parent_request_id == outer.request_id
                assert "seen" not in context.agent_context
                context.agent_context["seen"] = message
                children.append(context)
                assert [child.is_open for child in children] == [False] * (len(children) - 1) + [True]
                connection.send(context.user_id)

        with conversation(wrapped(manager, handler, context_per_message=True)) as connection:
            for _ in range(3):
                connection.send("hi")
                assert connection.recv(PATIENCE) == "alice"
        assert not children[-1].is_open
        assert len({child.request_id for child in children}) == 3

    @pytest.mark.parametrize("name", BAD_FRAMES)
    def test_a_malformed_frame_takes_down_nothing_but_its_connection(
        self, manager: UserContextManager, name: str
    ) -> None:
        with serving_threads(wrapped(manager)) as url, sync_client(url, "bob") as bob:
            with raw(url, handshake(url, "alice")) as bare:
                read_head(bare)
                wait_until(lambda: live(manager) == 2, "it is there")
                bare.sendall(BAD_FRAMES[name])
                rest = bare.recv(1000)
                assert rest[:1] == b"\x88"
                assert int.from_bytes(rest[2:4], "big") in (1002, 1007, 1009)
            wait_until(lambda: live(manager) == 1, "its context is closed")
            bob.send("hi")
            assert bob.recv(PATIENCE) == "bob: hi"


class TestRecords:
    @pytest.fixture
    def diary(self) -> Diary:
        return Diary()

    @pytest.fixture
    def strict(self, make_manager: MakeManager, diary: Diary) -> UserContextManager:
        return make_manager(guard="open", ledger=diary, audit="strict")

    def test_the_opening_is_durable_before_the_handler_and_the_outcome_before_the_close(
        self, strict: UserContextManager, diary: Diary
    ) -> None:
        def handler(connection: ServerConnection) -> None:
            diary.story.append("handler")
            connection.recv()
            connection.close(4000)
            diary.story.append("closed by the handler")

        with conversation(wrapped(strict, handler)) as connection:
            connection.send("end")
            assert sync_ending_of(connection)[0] == 4000
        expected = ["opened", "durable", "handler", "answered", "durable", "closed by the handler", "closed"]
        assert diary.story[: len(expected)] == expected

    def test_who_cannot_be_recorded_is_refused_with_503(self, strict: UserContextManager, diary: Diary) -> None:
        diary.fails_at = "opened"
        with serving_threads(wrapped(strict)) as url:
            status, headers, _ = sync_refusal_of(url, "alice")
        assert (status, headers["retry-after"]) == (503, "1")
        assert live(strict) == 0

    def test_what_cannot_be_kept_up_with_waits(self, make_manager: MakeManager, diary: Diary) -> None:
        manager = make_manager(guard="open", ledger=diary)
        diary.has_room, diary.problem = False, "the disk is slow"
        with serving_threads(wrapped(manager)) as url:
            assert sync_refusal_of(url, "alice")[0] == 503
            diary.has_room = True
            with sync_client(url, "alice"):
                assert live(manager) == 1

    @pytest.mark.parametrize("closes", ["handler", "server"])
    def test_an_outcome_that_cannot_be_recorded_is_told(
        self, strict: UserContextManager, diary: Diary, closes: str
    ) -> None:
        def handler(connection: ServerConnection) -> None:
            connection.send("ready")
            if closes == "server":
                connection.recv()

        diary.fails_at = "answered"
        with serving_threads(wrapped(strict, handler)) as url:
            connection = sync_client(url, "alice", legacy=True)
            connection.recv(PATIENCE)
            if closes == "handler":
                assert sync_ending_of(connection)[0] == 1013
        if closes == "server":
            assert sync_ending_of(connection)[0] == 1013
        assert live(strict) == 0

    def test_the_span_of_the_connection_ends_when_it_is_accepted(self, make_manager: MakeManager) -> None:
        with installed(Sdk()) as sdk:
            manager = make_manager(guard="open")
            with conversation(wrapped(manager)) as connection:
                connection.send("hi")
                connection.recv(PATIENCE)
                assert about(sdk.one("ucm connection"))["ucm.event"] == "opened"
            message, close = sdk.one("ucm message"), sdk.one("ucm close")
            context = sdk.one("ucm connection").context
            assert context is not None
            for span in (message, close):
                assert [link.context.span_id for link in span.links] == [context.span_id]
