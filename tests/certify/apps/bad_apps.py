"""Applications that something is wrong with, other than that they mix users up."""

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, FastAPI, HTTPException, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


@asynccontextmanager
async def failing(_: FastAPI) -> AsyncGenerator[None]:
    raise RuntimeError("the database is not there")
    yield


does_not_start = FastAPI(lifespan=failing)


@asynccontextmanager
async def waiting(_: FastAPI) -> AsyncGenerator[None]:
    await asyncio.Event().wait()
    yield


does_not_come_up = FastAPI(lifespan=waiting)


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """No schema, no router: nobody can say what it answers to."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


hangs = FastAPI()


@hangs.get("/never")
async def never() -> None:
    await asyncio.Event().wait()


@hangs.get("/ok")
async def ok() -> dict[str, str]:
    return {"it": "works"}


exits = FastAPI()


@exits.get("/exit")
async def leave() -> None:
    os._exit(3)


fails = FastAPI()


@fails.get("/broken")
@fails.post("/also-broken")
async def broken() -> None:
    raise RuntimeError("of the application's own")


streams = FastAPI()


@streams.get("/stream")
async def stream() -> StreamingResponse:
    async def lines() -> AsyncIterator[bytes]:
        while True:
            yield b"and on " * 10_000
            await asyncio.sleep(0)

    return StreamingResponse(lines())


@streams.get("/ticks")
async def ticks() -> StreamingResponse:
    async def lines() -> AsyncIterator[bytes]:
        while True:
            yield b"tick\n"
            await asyncio.sleep(1)

    return StreamingResponse(lines())


closed = FastAPI()


@closed.get("/mine")
async def mine(request: Request) -> dict[str, str]:
    if request.headers.get("authorization") != "Bearer of somebody else":
        raise HTTPException(401)
    return {}


logs = FastAPI()


@logs.get("/loud")
async def loud() -> dict[str, str]:
    sys.stderr.write("x" * 2_000_000 + "\n")
    logging.getLogger("loud").warning("y" * 1_000_000)
    return {}


mixes = FastAPI()
LAST: dict[str, str] = {}


@mixes.post("/say")
async def say(text: str) -> dict[str, str]:
    """What was said before, by whoever, goes into the log and a header, and not into the body."""
    logging.getLogger("shop.orders").warning("before: %s", LAST.get("text"))
    LAST["text"] = text
    return {"said": text}


strict = FastAPI()
SIGNED_IN: Counter[str] = Counter()


@strict.post("/login")
async def login(name: Annotated[str, Body(embed=True)]) -> dict[str, str]:
    SIGNED_IN[name] += 1
    if SIGNED_IN[name] > 1:
        raise HTTPException(429)
    return {"token": f"of {name}"}


@strict.get("/me")
async def me(request: Request) -> dict[str, str]:
    return {"me": request.headers.get("authorization", "")}
