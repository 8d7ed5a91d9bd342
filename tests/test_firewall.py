"""ContextFirewall: no ContextVar crosses in either direction, everything else does; and nothing stays behind."""

import asyncio
import contextvars
import gc
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from types import coroutine
from typing import Any, TypeVar

import anyio
import pytest

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from ucm_middleware import (
    ContextFirewall,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
)
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

USER: ContextVar[str] = ContextVar("USER", default="nobody")
TRACE: ContextVar[str] = ContextVar("TRACE", default="none")
UNSET: ContextVar[str] = ContextVar("UNSET")

T = TypeVar("T")
Handler = Callable[[], Awaitable[object]]


async def nothing() -> Message:
    return {"type": "http.request"}


def coroutine_of(work: Awaitable[T]) -> Coroutine[Any, Any, T]:
    """What servers give and tasks take."""
    assert asyncio.iscoroutine(work)
    return work


async def ignore(message: Message) -> None:
    pass


def running(handler: Handler) -> ASGIApp:
    """An app that only runs the handler."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()

    return app


async def behind(handler: Handler, *keep: ContextVar[Any]) -> None:
    """One request to the handler through a firewall."""
    await ContextFirewall(running(handler), keep=keep)(http_scope(), nothing, ignore)


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    """What an earlier request left in the Context of the server."""
    tokens = USER.set("alice"), TRACE.set("span 1")
    yield
    USER.reset(tokens[0])
    TRACE.reset(tokens[1])


class TestValues:
    @pytest.mark.parametrize("make_scope", [http_scope, websocket_scope])
    async def test_none_comes_in(self, make_scope: Callable[[], Scope]) -> None:
        seen: list[str] = []

        async def look() -> None:
            seen.extend((USER.get(), TRACE.get()))
            assert len(contextvars.copy_context()) == 0
            await asyncio.sleep(0)
            seen.append(USER.get())

        await ContextFirewall(running(look))(make_scope(), nothing, ignore)
        assert seen == ["nobody", "none", "nobody"]

    async def test_none_goes_out(self) -> None:
        async def log_in() -> None:
            USER.set("bob")
            await asyncio.sleep(0)
            assert USER.get() == "bob"
            UNSET.set("left behind")

        await behind(log_in)
        assert USER.get() == "alice"
        assert UNSET.get(None) is None

    async def test_none_goes_from_one_request_to_the_next(self) -> None:
        seen: list[str] = []

        async def handle() -> None:
            seen.append(USER.get())
            USER.set("bob")
            await asyncio.sleep(0)

        app = ContextFirewall(running(handle))
        for _ in range(3):
            await app(http_scope(), nothing, ignore)
        assert seen == ["nobody"] * 3

    async def test_none_crosses_between_requests_at_once(self) -> None:
        seen: list[tuple[str, str]] = []

        def handler_of(user: str) -> Handler:
            async def handle() -> None:
                USER.set(user)
                for _ in range(5):
                    await asyncio.sleep(0)
                    seen.append((user, USER.get()))

            return handle

        await asyncio.gather(*(behind(handler_of(user)) for user in ("alice", "bob", "carol")))
        assert len(seen) == 15
        assert all(mine == got for mine, got in seen)

    async def test_what_is_kept_comes_in_and_nothing_of_it_goes_out(self) -> None:
        seen: list[str | None] = []

        async def look() -> None:
            seen.extend((USER.get(), TRACE.get(), UNSET.get(None)))
            TRACE.set("span 2")

        await behind(look, TRACE, UNSET)
        assert seen == ["nobody", "span 1", None]
        assert TRACE.get() == "span 1"

    @pytest.mark.parametrize("make_scope", [http_scope, websocket_scope])
    async def test_the_servers_own_code_stays_outside(self, make_scope: Callable[[], Scope]) -> None:
        seen: list[str] = []

        async def receive() -> Message:
            seen.append(USER.get())
            await asyncio.sleep(0)
            seen.append(USER.get())
            TRACE.set("of the server")
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            seen.append(USER.get())
            await asyncio.sleep(0)
            seen.append(USER.get())

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            USER.set("bob")
            await receive()
            await send({"type": "http.response.start", "status": 200})
            assert (USER.get(), TRACE.get()) == ("bob", "none")

        await ContextFirewall(app)(make_scope(), receive, send)
        assert seen == ["alice"] * 4

    def test_a_connection_that_is_the_last_one_pays_nothing_where_nothing_is_set_outside(self) -> None:
        seen: list[object] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend((receive, send))
            USER.set("bob")

        async def serve() -> None:
            await ContextFirewall(app)(websocket_scope(), nothing, ignore)
            assert USER.get() == "nobody"

        contextvars.Context().run(asyncio.run, serve())
        assert seen == [nothing, ignore]

    @pytest.mark.parametrize("scope", [http_scope(), http_scope(http_version="2"), websocket_scope(http_version="2")])
    def test_what_is_not_the_last_one_pays(self, scope: Scope) -> None:
        # A server may start the next request of the connection from within them, or wait for it.
        seen: list[str] = []

        async def receive() -> Message:
            seen.append(USER.get())
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            seen.append(USER.get())

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            USER.set("bob")
            await receive()
            await answer(send)

        contextvars.Context().run(asyncio.run, ContextFirewall(app)(scope, receive, send))
        assert seen == ["nobody"] * 3

    async def test_a_lifespan_is_let_through_as_it_is(self) -> None:
        seen: list[object] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend((scope, receive, send, USER.get()))

        scope: Scope = {"type": "lifespan", "state": {}}
        await ContextFirewall(app)(scope, nothing, ignore)
        assert seen[0] is scope
        assert seen[1:] == [nothing, ignore, "alice"]

    async def test_a_second_firewall_inside_is_none(self) -> None:
        seen: list[str] = []

        async def look() -> None:
            seen.append(USER.get())

        inner = ContextFirewall(running(look))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            USER.set("bob")
            await inner(scope, receive, send)

        scope = http_scope()
        await ContextFirewall(app)(scope, nothing, ignore)
        await inner(scope, nothing, ignore)  # the boundary of a request that has ended is none
        assert seen == ["bob", "nobody"]

    async def test_one_around_an_inner_scope_of_its_own_works_too(self) -> None:
        seen: list[str] = []

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(USER.get())
            USER.set("carol")
            await receive()
            await send({"type": "http.response.start", "status": 200})

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            USER.set("bob")
            await ContextFirewall(inner)(http_scope("/mounted"), receive, send)
            seen.append(USER.get())

        sent = await exchange(ContextFirewall(app), http_scope())
        assert seen == ["nobody", "bob"]
        assert status_of(sent) == 200


class TestTasks:
    async def test_the_app_runs_in_the_task_of_the_server(self) -> None:
        tasks: list[object] = []

        async def look() -> None:
            await asyncio.sleep(0)
            tasks.append(asyncio.current_task())

        await behind(look)
        assert tasks == [asyncio.current_task()]

    async def test_tasks_threads_and_callbacks_inherit(self) -> None:
        seen: list[str] = []

        def look() -> None:
            seen.append(USER.get())

        async def look_later() -> None:
            await asyncio.sleep(0)
            look()
            USER.set("carol")

        async def handle() -> None:
            USER.set("bob")
            await asyncio.create_task(look_later())
            await asyncio.to_thread(look)
            asyncio.get_running_loop().call_soon(look)
            await asyncio.sleep(0)
            async with anyio.create_task_group() as group:
                group.start_soon(look_later)
            look()

        await behind(handle)
        assert seen == ["bob"] * 5

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="eager task factories came with Python 3.12")
    async def test_eager_tasks_inherit_too(self) -> None:
        seen: list[str] = []

        async def look() -> None:
            seen.append(USER.get())
            USER.set("carol")
            await asyncio.sleep(0)
            seen.append(USER.get())

        async def handle() -> None:
            USER.set("bob")
            task = asyncio.create_task(look())
            seen.append(USER.get())
            await task

        if sys.version_info >= (3, 12):
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        await asyncio.create_task(behind(handle))
        assert seen == ["bob", "bob", "carol"]
        assert USER.get() == "alice"

    async def test_a_task_that_outlives_the_request_keeps_its_values(self) -> None:
        seen: list[str] = []
        tasks: list[asyncio.Task[None]] = []

        async def outlive() -> None:
            await asyncio.sleep(0)
            seen.append(USER.get())

        async def handle() -> None:
            USER.set("bob")
            tasks.append(asyncio.create_task(outlive()))

        await behind(handle)
        await tasks[0]
        assert seen == ["bob"]


class TestMessages:
    @pytest.mark.parametrize("make_scope", [http_scope, websocket_scope])
    async def test_a_task_may_be_made_of_one(self, make_scope: Callable[[], Scope]) -> None:
        got: list[object] = []

        async def send(message: Message) -> None:
            await asyncio.sleep(0)
            got.append(message)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            got.append(await asyncio.create_task(coroutine_of(receive())))
            await asyncio.create_task(coroutine_of(send({"type": "sent"})))

        await ContextFirewall(app)(make_scope(), nothing, send)
        assert got == [{"type": "http.request"}, {"type": "sent"}]

    @pytest.mark.parametrize("error", [LookupError("of the server"), asyncio.CancelledError()])
    @pytest.mark.parametrize("turns", [0, 1])
    async def test_the_errors_of_the_server_reach_the_app(self, error: BaseException, turns: int) -> None:
        async def send(message: Message) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            raise error

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            USER.set("bob")
            with pytest.raises(type(error)) as caught:
                await send({"type": "http.response.start", "status": 200})
            assert caught.value is error
            assert USER.get() == "bob"

        await ContextFirewall(app)(http_scope(), nothing, send)
        assert USER.get() == "alice"


class TestPassingThrough:
    @pytest.mark.parametrize("error", [LookupError("of the app"), SystemExit(3), asyncio.CancelledError()])
    @pytest.mark.parametrize("turns", [0, 1])
    async def test_errors_of_the_app(self, error: BaseException, turns: int) -> None:
        async def fail() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            raise error

        with pytest.raises(type(error)) as caught:
            await behind(fail)
        assert caught.value is error

    async def test_errors_of_what_the_app_waits_for(self) -> None:
        async def handle() -> None:
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_exception, LookupError("later"))
            with pytest.raises(LookupError, match="later"):
                await future
            USER.set("bob")

        await behind(handle)

    async def test_a_cancellation_which_the_app_may_answer(self) -> None:
        seen: list[str] = []
        waiting = asyncio.Event()

        async def handle() -> None:
            USER.set("bob")
            try:
                waiting.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append(USER.get())
                await asyncio.sleep(0)
                seen.append(USER.get())
                raise

        request = asyncio.create_task(behind(handle))
        await waiting.wait()
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()
        assert seen == ["bob", "bob"]

    async def test_deadlines_and_scopes_inside_the_app(self) -> None:
        done: list[str] = []

        async def handle() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await asyncio.Event().wait()
            with anyio.move_on_after(0) as scope:
                await anyio.sleep_forever()
            assert scope.cancelled_caught
            done.append("here")

        await behind(handle)
        assert done == ["here"]

    async def test_scopes_outside_of_the_app(self) -> None:
        with anyio.move_on_after(0) as scope:
            await behind(anyio.sleep_forever)
        assert scope.cancelled_caught

    def test_a_coroutine_that_is_dropped_is_closed_in_its_own_context(self) -> None:
        seen: list[str] = []

        async def handle() -> None:
            USER.set("bob")
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(USER.get())

        async def start() -> None:
            request = behind(handle)
            request.send(None)
            request.close()

        asyncio.run(start())
        assert seen == ["bob"]

    async def test_generators_broken_off_reset_their_tokens(self) -> None:
        seen: list[str] = []

        @asynccontextmanager
        async def logged_in() -> AsyncIterator[None]:
            token = USER.set("bob")
            try:
                yield
            finally:
                USER.reset(token)

        async def stream() -> AsyncGenerator[int]:
            async with logged_in():
                for number in range(9):
                    await asyncio.sleep(0)
                    yield number

        async def handle() -> None:
            async with aclosing(stream()) as numbers:
                async for number in numbers:
                    seen.append(USER.get())
                    if number == 2:
                        break
            seen.append(USER.get())

        await behind(handle)
        assert seen == ["bob", "bob", "bob", "nobody"]

    async def test_awaitables_of_every_kind(self) -> None:
        # An app, a receive and a send may be anything that can be awaited.
        seen: list[str] = []

        class Steps:
            def __await__(self) -> Generator[Any, Any, None]:
                seen.append(USER.get())
                USER.set("carol")
                yield from asyncio.sleep(0).__await__()
                seen.append(USER.get())

        @coroutine
        def by_generator() -> Generator[Any, Any, None]:
            yield from Steps().__await__()

        def by_future() -> asyncio.Future[None]:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, None)
            return future

        kinds: list[Callable[[], Awaitable[None]]] = [Steps, by_generator, by_future]
        for kind in kinds:
            seen.clear()

            def app(
                scope: Scope, receive: Receive, send: Send, kind: Callable[[], Awaitable[None]] = kind
            ) -> Awaitable[None]:
                return kind()

            await ContextFirewall(app)(http_scope(), nothing, ignore)
            assert USER.get() == "alice"
            assert seen in ([], ["nobody", "carol"])

            async def sending(scope: Scope, receive: Receive, send: Send) -> None:
                USER.set("bob")
                await send({"type": "http.response.start", "status": 200})
                assert USER.get() == "bob"

            def send(message: Message, kind: Callable[[], Awaitable[None]] = kind) -> Awaitable[None]:
                return kind()

            seen.clear()
            await ContextFirewall(sending)(http_scope(), nothing, send)
            assert seen in ([], ["alice", "carol"])


class TestScope:
    async def test_the_state_is_a_copy_and_the_scope_the_same(self) -> None:
        seen: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope)
            assert scope["state"]["pool"] is pool
            assert "user" not in scope["state"]
            scope["state"]["user"] = "bob"
            scope["route"] = "/desk"

        pool = object()
        state = {"pool": pool}  # one object for all requests of a server
        scopes = [http_scope(state=state), http_scope(state=state)]
        for scope in scopes:
            await ContextFirewall(app)(scope, nothing, ignore)
        assert all(mine is theirs for mine, theirs in zip(seen, scopes, strict=True))
        assert state == {"pool": pool}

    async def test_no_state_is_fine(self) -> None:
        seen: list[bool] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append("state" in scope)

        await ContextFirewall(app)(http_scope(), nothing, ignore)
        assert seen == [False]


# Reference cycles: what a request leaves for the garbage collector costs every request after it.


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def garbage_of(request: Callable[[], Awaitable[object]]) -> list[str]:
    """The types of the objects that only the garbage collector can free, after a few requests."""
    await request()  # what is made once, on the first request
    await asyncio.sleep(0)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            await request()
            await asyncio.sleep(0)
        gc.collect()
        return [type(thing).__name__ for thing in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


class Resource:
    async def __aenter__(self) -> None:
        await asyncio.sleep(0)

    async def __aexit__(self, *args: object) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        pass


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    USER.set("bob")
    await receive()
    await asyncio.sleep(0)
    await answer(send)


async def using_everything(scope: Scope, receive: Receive, send: Send) -> None:
    context = current_context()
    context.agent_context["me"] = context.to_dict()
    context.audit_metadata["ticket"] = 7
    context.environment.set("MODE", "fast")
    context.closing(Resource())
    context.callback(asyncio.sleep, 0)
    await context.enter_async_context(Resource())
    await context.enter_async_context(Resource(), owner_task=True)
    child = context.create_child_context("tool")
    await child.enter_async_context(Resource())
    await answer(send)


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    current_context().closing(Resource())
    await asyncio.sleep(0)
    raise LookupError("of the app")


async def failing_to_release(scope: Scope, receive: Receive, send: Send) -> None:
    async def broken() -> None:
        raise OSError("no space left")

    current_context().callback(broken)
    current_context().callback(int, "x")
    await answer(send)


async def refused(scope: Scope, receive: Receive, send: Send) -> None:
    current_context().bind("bob")


async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
    context = current_context()
    # From outside of it: a request that closes its own context is not cut off.
    asyncio.get_running_loop().call_soon(context.close, "revoked", context=contextvars.Context())
    await asyncio.Event().wait()


async def conversation(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    current_context().agent_context["scope"] = "held"
    await receive()


APPS: list[ASGIApp] = [plain, using_everything, failing, failing_to_release, refused, cut_off]


@pytest.mark.usefixtures("_no_collection")
class TestGarbage:
    async def test_the_firewall_alone_leaves_none(self) -> None:
        app = ContextFirewall(plain)
        assert await garbage_of(lambda: exchange(app, http_scope(state={}))) == []

    @pytest.mark.parametrize("app", APPS, ids=lambda app: app.__name__)
    @pytest.mark.parametrize("identified", [False, True])
    async def test_the_whole_middleware_leaves_none_for_a_request(self, app: ASGIApp, identified: bool) -> None:
        middleware = UserContextMiddleware(
            app, manager=UserContextManager(), identify=(lambda connection: "alice") if identified else None
        )

        async def request() -> None:
            try:
                await exchange(middleware, http_scope(state={}))
            except LookupError:
                assert app is failing

        assert await garbage_of(request) == []

    async def test_nor_for_a_request_that_is_cancelled(self) -> None:
        waiting = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await current_context().enter_async_context(Resource())
            waiting.set()
            await asyncio.Event().wait()

        middleware = UserContextMiddleware(app, manager=UserContextManager())

        async def request() -> None:
            waiting.clear()
            task = asyncio.create_task(exchange(middleware, http_scope()))
            await waiting.wait()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # in the middle of the teardown
            await asyncio.wait([task])
            assert task.cancelled()

        assert await garbage_of(request) == []

    async def test_nor_for_a_request_that_is_read_ahead(self) -> None:
        middleware = UserContextMiddleware(plain, manager=UserContextManager(), cancel_on_disconnect=True)
        assert await garbage_of(lambda: exchange(middleware, http_scope())) == []

    async def test_nor_for_a_connection(self) -> None:
        middleware = UserContextMiddleware(
            conversation, manager=UserContextManager(), identify=lambda connection: "bob"
        )
        handshake: Message = {"type": "websocket.connect"}
        farewell: Message = {"type": "websocket.disconnect", "code": 1000}
        assert await garbage_of(lambda: exchange(middleware, websocket_scope(), handshake, farewell)) == []

    @pytest.mark.parametrize("extensions", [{}, DENIAL])
    async def test_nor_for_a_connection_that_is_refused(self, extensions: dict[str, Any]) -> None:
        middleware = UserContextMiddleware(
            conversation, manager=UserContextManager(), identify=lambda connection: None, require_identity=True
        )
        assert await garbage_of(lambda: exchange(middleware, websocket_scope(extensions=extensions))) == []

    async def test_a_context_that_has_closed_is_not_kept_and_keeps_nothing(self) -> None:
        kept: list[UserExecutionContext] = []
        held: list[weakref.ref[Resource]] = []
        variable: ContextVar[Resource] = ContextVar("variable")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            kept.append(current_context())
            resource = Resource()
            variable.set(resource)
            held.append(weakref.ref(resource))
            await using_everything(scope, receive, send)

        await exchange(UserContextMiddleware(app, manager=UserContextManager()), http_scope())
        await asyncio.sleep(0)
        context = kept.pop()
        assert gc.get_referrers(context) == []
        assert held[0]() is None
