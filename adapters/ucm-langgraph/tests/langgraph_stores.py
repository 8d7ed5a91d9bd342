"""LangGraph's savers and stores, and one way to call those that block and those that do not."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import StateGraph
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.store.postgres import AsyncPostgresStore, PostgresStore
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore

from support.postgres import Database

KINDS = ["memory", "sqlite", "async sqlite", "postgres", "async postgres"]
SAVERS = STORES = KINDS

_TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "store")


@dataclass(frozen=True, slots=True)
class AnySaver:
    kind: str
    bare: BaseCheckpointSaver[Any]

    @property
    def blocks(self) -> bool:
        return not self.kind.startswith("async")


@dataclass(frozen=True, slots=True)
class AnyStore:
    kind: str
    bare: BaseStore

    @property
    def blocks(self) -> bool:
        return not self.kind.startswith("async")

    async def call(self, store: BaseStore, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method of ``store``, or where that blocks not, the one that does the same."""
        if self.blocks:
            return await asyncio.to_thread(getattr(store, method), *args, **kwargs)
        return await getattr(store, "a" + method)(*args, **kwargs)


def new_graph(state: type) -> Any:
    """A ``StateGraph``, whose types say more than a test has to."""
    return StateGraph(state)


async def run_graph(saver: AnySaver, graph: Any, given: Any, config: Mapping[str, Any]) -> Any:
    """Run a graph on a saver as the saver can."""
    if saver.blocks:
        return await asyncio.to_thread(graph.invoke, given, dict(config))
    return await graph.ainvoke(given, dict(config))


@asynccontextmanager
async def open_saver(kind: str, folder: Path, database: Callable[[], Database]) -> AsyncIterator[AnySaver]:
    async with AsyncExitStack() as stack:
        made: BaseCheckpointSaver[Any]
        match kind:
            case "memory":
                made = InMemorySaver()
            case "sqlite":
                made = stack.enter_context(SqliteSaver.from_conn_string(str(folder / "checkpoints.db")))
            case "async sqlite":
                path = str(folder / "checkpoints.db")
                made = await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(path))
            case "postgres":
                made = stack.enter_context(PostgresSaver.from_conn_string(database().owner.dsn))
            case _:
                dsn = database().owner.dsn
                made = await stack.enter_async_context(AsyncPostgresSaver.from_conn_string(dsn))
        yield AnySaver(kind, made)


@asynccontextmanager
async def open_store(kind: str, folder: Path, database: Callable[[], Database]) -> AsyncIterator[AnyStore]:
    async with AsyncExitStack() as stack:
        made: BaseStore
        match kind:
            case "memory":
                made = InMemoryStore()
            case "sqlite":
                blocking = stack.enter_context(SqliteStore.from_conn_string(str(folder / "store.db")))
                blocking.setup()
                made = blocking
            case "async sqlite":
                sqlite = await stack.enter_async_context(AsyncSqliteStore.from_conn_string(str(folder / "store.db")))
                await sqlite.setup()
                made = sqlite
            case "postgres":
                made = stack.enter_context(PostgresStore.from_conn_string(database().owner.dsn))
            case _:
                made = await stack.enter_async_context(AsyncPostgresStore.from_conn_string(database().owner.dsn))
        yield AnyStore(kind, made)


def set_up(database: Database) -> None:
    with PostgresSaver.from_conn_string(database.owner.dsn) as saver:
        saver.setup()
    with PostgresStore.from_conn_string(database.owner.dsn) as store:
        store.setup()


def empty(database: Database) -> None:
    database.execute(f"truncate {', '.join(_TABLES)}")
