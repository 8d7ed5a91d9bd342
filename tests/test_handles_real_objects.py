"""Owned handles of what adapters really give out, and in the hands of the frameworks that look at types."""

import asyncio
import dataclasses
import gc
import inspect
import sqlite3
import types
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, closing
from functools import partial, singledispatch
from typing import Any, Protocol, runtime_checkable

import aiosqlite
import httpx
import pydantic
import pytest
from fastapi.encoders import jsonable_encoder
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette._utils import is_async_callable

from support.contexts import running_as
from ucm_middleware import (
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    handles,
    managed_user_context,
    revoke_handle,
)

pytestmark = pytest.mark.security


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager()


@pytest.fixture
def alice(manager: UserContextManager) -> Iterator[UserExecutionContext]:
    context = manager.create_isolated_context("alice")
    yield context
    context.close()


class TestSqlite:
    def test_a_connection_of_c_code(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        connection = sqlite3.connect(":memory:")
        alice.closing(connection)
        handle = alice.own(connection)
        assert isinstance(handle, sqlite3.Connection)
        with handle as entered:
            assert entered is handle
            handle.executescript("create table notes (body text); insert into notes values ('a'), ('b')")
        cursor = handle.execute("select body from notes")
        assert isinstance(cursor, sqlite3.Cursor)
        assert next(cursor) == ("a",)
        with running_as(manager, "bob"):
            for use in (lambda: handle.execute("select 1"), lambda: next(cursor), lambda: cursor.fetchall()):
                with pytest.raises(CrossUserAccessError):
                    use()
        assert cursor.fetchall() == [("b",)]
        assert cursor.connection is handle
        handle.row_factory = sqlite3.Row
        assert connection.row_factory is sqlite3.Row
        alice.close()
        for use in (lambda: handle.execute("select 1"), lambda: cursor.fetchall(), lambda: handle.row_factory):
            with pytest.raises(ContextClosedError):
                use()

    def test_what_c_code_checks_itself_is_not_fooled(self, alice: UserExecutionContext) -> None:
        with ExitStack() as stack:
            source = stack.enter_context(closing(sqlite3.connect(":memory:")))
            copy = stack.enter_context(closing(sqlite3.connect(":memory:")))
            with pytest.raises(TypeError):
                source.backup(alice.own(copy))

    async def test_aiosqlite(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        connection = await alice.enter_async_context(aiosqlite.connect(":memory:"))
        handle = alice.own(connection)
        assert await (await handle.execute("select 1")).fetchone() == (1,)
        async with handle.execute("select 1 union select 2") as cursor:
            assert await cursor.fetchone() == (1,)
            with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
                await cursor.fetchone()
            assert [row async for row in cursor] == [(2,)]
        await alice.aclose()
        with pytest.raises(ContextClosedError):
            await handle.execute("select 1")


@asynccontextmanager
async def database() -> AsyncIterator[AsyncSession]:
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        async with AsyncSession(engine) as session:
            yield session
    finally:
        await engine.dispose()


class TestSqlalchemy:
    async def test_a_session(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        session = await alice.enter_async_context(database())
        handle = alice.own(session)
        assert isinstance(handle, AsyncSession)
        async with handle.begin():
            await handle.execute(text("create table notes (body text)"))
            await handle.execute(text("insert into notes values ('a'), ('b')"))
        result = await handle.stream(text("select body from notes order by body"))
        rows = aiter(result)
        assert tuple(await anext(rows)) == ("a",)
        with running_as(manager, "bob"):
            for use in (
                lambda: handle.execute(text("select 1")),
                lambda: anext(rows),
                lambda: handle.begin().__aenter__(),
                handle.close,
            ):
                with pytest.raises(CrossUserAccessError):
                    await use()
        assert [tuple(row) async for row in rows] == [("b",)]
        assert (await handle.scalars(text("select count(*) from notes"))).one() == 2
        assert await handle.run_sync(lambda raw: type(raw) is Session)  # a callback gets the object itself
        await alice.aclose()
        assert alice.lifetime.failures == ()
        with pytest.raises(ContextClosedError, match="AsyncSession, made at"):
            await handle.execute(text("select 1"))

    async def test_a_handle_closes_with_its_context(self, alice: UserExecutionContext) -> None:
        async with database() as session:
            handle = alice.closing(alice.own(session))
            await handle.execute(text("select 1"))
            assert session.in_transaction()
            await alice.aclose()
            assert alice.lifetime.failures == ()
            assert not session.in_transaction()


class TestHttpx:
    async def test_a_client(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"one "
            yield b"two"

        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=chunks()))
        client = await alice.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://service"))
        handle = alice.own(client)
        assert isinstance(handle, httpx.AsyncClient)
        assert (await handle.get("/")).text == "one two"
        async with handle.stream("GET", "/") as response:
            assert isinstance(response, httpx.Response)
            body = response.aiter_raw()
            assert await anext(body) == b"one "
            with running_as(manager, "bob"):
                for use in (lambda: handle.get("/"), lambda: anext(body), response.aread):
                    with pytest.raises(CrossUserAccessError):
                        await use()
            assert await anext(body) == b"two"
        await alice.aclose()
        with pytest.raises(ContextClosedError):
            await handle.get("/")


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index * 2

    def __contains__(self, item: object) -> bool:
        return item == "in"

    def __add__(self, other: int) -> int:
        return self.value + other

    def __radd__(self, other: int) -> int:
        return self.value + other

    def __iadd__(self, other: int) -> "Slotted":
        self.value += other
        return self

    def __bool__(self) -> bool:
        return self.value != 0


@dataclasses.dataclass
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int


class Tool:
    """Adds."""

    def __call__(self, number: int, *, twice: bool = False) -> int:
        return number * (2 if twice else 1)


class Never:
    __hash__ = None  # type: ignore[assignment]


class Finalized:
    ended: typing.ClassVar[list[str]] = []

    def __del__(self) -> None:
        self.ended.append("once")


async def search(query: str, limit: int = 10) -> list[str]:
    """Searches."""
    return [query] * limit


class TestSpecialMethods:
    def test_they_are_those_of_the_type_and_checked(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        handle: Any = alice.own(Slotted())
        checked: list[Callable[[], object]] = [
            lambda: len(handle),
            lambda: handle[4],
            lambda: "in" in handle,
            lambda: handle + 1,
            lambda: 1 + handle,
            lambda: bool(handle),
            lambda: handle.value,
        ]
        assert [use() for use in checked] == [3, 8, True, 2, 2, True, 1]
        same = handle
        same += 4
        assert same is handle
        assert handle.value == 5
        with running_as(manager, "bob"):
            for use in checked:
                with pytest.raises(CrossUserAccessError):
                    use()
        missing: list[Callable[[], object]] = [
            lambda: handle - 1,
            lambda: handle(),
            lambda: next(handle),
            lambda: handle.__enter__,
        ]
        for use in missing:
            with pytest.raises((TypeError, AttributeError)):
                use()
        assert not callable(handle)
        with pytest.raises(AttributeError):
            handle.unknown = 1

    def test_equality_and_hash_by_value(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        point, frozen = Point(1), Frozen(1)
        handle, hashed = alice.own(point), alice.own(frozen)
        assert handle == Point(1) == handle
        assert handle != Point(2)
        assert hash(hashed) == hash(frozen)
        assert {hashed: 1}[frozen] == 1
        with pytest.raises(TypeError, match="unhashable"):
            hash(handle)
        with pytest.raises(TypeError, match="unhashable"):
            hash(alice.own(Never()))
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            assert handle == Point(1)

    def test_equality_and_hash_by_identity_outlive_the_context(self, alice: UserExecutionContext) -> None:
        tool = Tool()
        handle, other = alice.own(tool), alice.own(tool)
        held = {handle}
        alice.close()
        assert handle in held
        assert other not in held
        assert handle != tool

    def test_a_finalizer_runs_once_and_for_the_target(self, alice: UserExecutionContext) -> None:
        handle = alice.own(Finalized())
        assert Finalized.ended == []
        del handle
        assert Finalized.ended == ["once"]

    def test_the_classes_die_with_the_types(self, alice: UserExecutionContext) -> None:
        def make() -> None:
            kind = type("Passing", (), {"run": lambda self: 1, "__call__": lambda self: 2})
            handle: Any = alice.own(kind())
            assert (handle.run(), handle()) == (1, 2)

        make()
        gc.collect()
        known = len(handles._kinds), len(handles._is_lazy)
        for _ in range(10):
            make()
        gc.collect()
        assert (len(handles._kinds), len(handles._is_lazy)) == known


class TestFrameworks:
    async def test_a_method_looks_like_one(self, alice: UserExecutionContext) -> None:
        client = httpx.AsyncClient()
        await alice.enter_async_context(client)
        handle = alice.own(client)
        assert inspect.ismethod(handle.get)
        assert inspect.iscoroutinefunction(handle.get)
        assert is_async_callable(handle.get)
        assert is_async_callable(partial(handle.get, "/"))
        assert not inspect.iscoroutinefunction(handle.stream)
        assert inspect.signature(handle.get) == inspect.signature(client.get)
        assert (handle.get.__name__, handle.get.__doc__) == (client.get.__name__, client.get.__doc__)
        assert handle.get.__self__ is handle
        assert handle.get == handle.get
        assert hash(handle.get) == hash(handle.get)
        assert handle.get != handle.post
        await alice.aclose()

    def test_a_method_of_c_code_looks_like_one(self, alice: UserExecutionContext) -> None:
        with closing(sqlite3.connect(":memory:")) as connection:
            handle = alice.own(connection)
            assert inspect.isbuiltin(handle.execute)
            assert inspect.signature(handle.backup) == inspect.signature(connection.backup)

    @pytest.mark.parametrize(
        "target", [Tool(), search, partial(search, limit=3)], ids=["object", "function", "partial"]
    )
    def test_a_tool_has_its_signature(self, alice: UserExecutionContext, target: Callable[..., object]) -> None:
        tool = alice.own(target)
        assert callable(tool)
        assert inspect.signature(tool) == inspect.signature(target)
        assert inspect.iscoroutinefunction(tool) == inspect.iscoroutinefunction(target)
        assert tool.__doc__ == target.__doc__
        assert "query" in str(inspect.signature(alice.own(search)))
        assert typing.get_type_hints(alice.own(search))["query"] is str

    async def test_a_function_is_called_and_checked(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        tool = alice.own(search)
        assert await tool("a", limit=2) == ["a", "a"]
        begun: Awaitable[list[str]] = tool("a")
        with running_as(manager, "bob"):
            with pytest.raises(CrossUserAccessError):
                await tool("a")
            with pytest.raises(CrossUserAccessError):
                await begun

    def test_pydantic_takes_it_for_its_type(self, alice: UserExecutionContext) -> None:
        class Deps(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
            tool: Tool

        handle = alice.own(Tool())
        assert Deps(tool=handle).tool is handle
        with pytest.raises(pydantic.ValidationError):
            Deps(tool=alice.own(Slotted()))  # type: ignore[arg-type]

    def test_isinstance_dispatch_and_protocols(self, alice: UserExecutionContext) -> None:
        @runtime_checkable
        class Sized(Protocol):
            def __len__(self) -> int: ...

        @singledispatch
        def kind(value: object) -> str:
            return "any"

        kind.register(Tool, lambda value: "tool")
        handle = alice.own(Tool())
        assert isinstance(handle, (Tool, Callable))  # type: ignore[arg-type]
        assert not isinstance(handle, (Slotted, Sized))
        assert isinstance(alice.own(Slotted()), Sized)
        assert kind(handle) == "tool"
        assert type(handle) is not Tool
        with pytest.raises(TypeError, match="made by context"):
            type(handle)()
        revoke_handle(handle)
        assert isinstance(handle, Tool)
        assert "__call__" in dir(handle)

    async def test_stacks_enter_and_exit_it(self, alice: UserExecutionContext) -> None:
        class Both:
            def __init__(self) -> None:
                self.log: list[str] = []

            def __enter__(self) -> "Both":
                return self

            def __exit__(self, *error: object) -> None:
                self.log.append("exit")

            async def __aenter__(self) -> "Both":
                return self

            async def __aexit__(self, *error: object) -> None:
                self.log.append("aexit")

            async def count(self) -> AsyncGenerator[int]:
                try:
                    yield 1
                    yield 2
                finally:
                    self.log.append("stopped")

        target = Both()
        handle = alice.own(target)
        async with AsyncExitStack() as stack:
            assert await stack.enter_async_context(handle) is handle
            assert stack.enter_context(handle) is handle
            async with aclosing(handle.count()) as numbers:
                assert isinstance(numbers, types.AsyncGeneratorType)
                assert await anext(numbers) == 1
        assert target.log == ["stopped", "exit", "aexit"]

    async def test_futures_and_tasks_that_methods_return(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        class Scheduler:
            def begin(self) -> "asyncio.Task[int]":
                return asyncio.create_task(self.work())

            async def work(self) -> int:
                await asyncio.sleep(0)
                return 7

        handle = alice.own(Scheduler())
        assert await handle.begin() == 7
        assert sum(await asyncio.gather(handle.begin(), handle.work())) == 14
        assert await asyncio.wait_for(handle.work(), 10) == 7
        async with asyncio.TaskGroup() as group:
            task = group.create_task(handle.work())
        assert task.result() == 7
        task_of_hers = handle.begin()
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await task_of_hers
        assert await task_of_hers == 7

    def test_what_is_patched_in_is_what_runs(self, alice: UserExecutionContext) -> None:
        target = Point(1)
        handle = alice.own(target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handle, "x", 2)
            assert target.x == 2
        assert target.x == 1

    def test_what_looks_at_the_type_itself_is_not_fooled(self, alice: UserExecutionContext) -> None:
        assert dataclasses.is_dataclass(Point(1))
        assert not dataclasses.is_dataclass(alice.own(Point(1)))

    def test_what_goes_round_it_is_what_the_documentation_says(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        handle = alice.own(Point(1, ["raw"]))
        raw = handle.tags
        with running_as(manager, "bob"):
            assert raw == ["raw"]  # a result that was given out
            assert object.__getattribute__(handle, "_Handle__cell").target.x == 1  # private attributes
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            jsonable_encoder(handle)

    def test_run_in_a_context_of_its_own(self, alice: UserExecutionContext) -> None:
        handle = alice.own(Tool())
        with managed_user_context(alice):
            assert handle(3, twice=True) == 6
