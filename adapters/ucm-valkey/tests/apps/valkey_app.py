"""A shop on one small pool: each user has a basket, which the cache keeps. What it does, its path says."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import UserContextManager, UserContextMiddleware, current_context
from ucm_middleware.identity import Identified
from ucm_valkey import ValkeyCache


def pool(username: str, password: str) -> Any:
    kind = import_module(f"{os.environ['SHOP_LIBRARY']}.asyncio").BlockingConnectionPool
    return kind(
        host="127.0.0.1",
        port=int(os.environ["SHOP_VALKEY_PORT"]),
        max_connections=int(os.environ["SHOP_CONNECTIONS"]),
        username=username,
        password=password,
    )


admin = pool("default", os.environ["SHOP_ADMIN"])
gate = pool("gate", os.environ["SHOP_GATE"])
cache = ValkeyCache(gate, admin=admin) if os.environ["SHOP_MODE"] == "server users" else ValkeyCache(admin)
visits = ValkeyCache(admin, namespace="visits", anonymous_ttl=60)
manager = UserContextManager(plugins=[cache, visits])


def identify(request: Any) -> Identified:
    # For the test alone: who calls says who it is.
    return request.headers.get("user")  # type: ignore[no-any-return]


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    yield
    for each in (admin, gate):
        await each.disconnect()


async def put(request: Request) -> JSONResponse:
    mine = cache.current()
    item = (await request.body()).decode()
    number = await mine.incr("items")
    await mine.set(f"item {number}", item)
    found = await mine.get_many(*(f"item {earlier}" for earlier in range(1, number + 1)))
    return JSONResponse({"user": current_context().user_id, "items": [value.decode() for value in found.values()]})


async def look(_: Request) -> JSONResponse:
    mine = cache.current()
    return JSONResponse([((await mine.get(name)) or b"").decode() async for name in mine.scan("item ")])


async def visit(_: Request) -> JSONResponse:
    mine = visits.current()
    return JSONResponse({"visits": await mine.incr("visits"), "ttl": await mine.ttl("visits")})


async def idle(_: Request) -> JSONResponse:
    return JSONResponse("nothing was cached")


routes = [
    Route("/basket", put, methods=["POST"]),
    Route("/basket", look),
    Route("/visit", visit),
    Route("/idle", idle),
]
app = Starlette(routes=routes, lifespan=lifespan)
app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)
