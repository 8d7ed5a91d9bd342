"""A shop on one small pool: each user has a basket, which the cache keeps. What it does, its path says."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from support.valkey import GATE, LibraryName, async_pool
from ucm_middleware import UserContextManager, UserContextMiddleware, current_context
from ucm_middleware.identity import Identified
from ucm_valkey import ValkeyCache

LIBRARY: LibraryName = "redis" if os.environ["SHOP_LIBRARY"] == "redis" else "valkey"
PORT = int(os.environ["SHOP_VALKEY_PORT"])
CONNECTIONS = int(os.environ["SHOP_CONNECTIONS"])

admin = async_pool(LIBRARY, PORT, CONNECTIONS)
gate = async_pool(LIBRARY, PORT, CONNECTIONS, username="gate", password=GATE)
cache = ValkeyCache(gate, admin=admin) if os.environ["SHOP_MODE"] == "server users" else ValkeyCache(admin)
visits = ValkeyCache(admin, namespace="visits", anonymous_ttl=60)
manager = UserContextManager(plugins=[cache, visits])


def identify(request: Any) -> Identified:
    # For the test alone: who calls says who it is.
    return request.headers.get("user")  # type: ignore[no-any-return]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    for pool in (admin, gate):
        await pool.disconnect()


app = FastAPI(lifespan=lifespan)
app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)


@app.post("/basket")
async def put(request: Request) -> dict[str, object]:
    mine = cache.current()
    item = (await request.body()).decode()
    number = await mine.incr("items")
    await mine.set(f"item {number}", item)
    found = await mine.get_many(*(f"item {earlier}" for earlier in range(1, number + 1)))
    return {"user": current_context().user_id, "items": [value.decode() for value in found.values()]}


@app.get("/basket")
async def look() -> list[str]:
    mine = cache.current()
    return [((await mine.get(name)) or b"").decode() async for name in mine.scan("item ")]


@app.get("/visit")
async def visit() -> dict[str, object]:
    mine = visits.current()
    return {"visits": await mine.incr("visits"), "ttl": await mine.ttl("visits")}


@app.get("/idle")
async def idle() -> str:
    return "nothing was cached"
