"""The same tools, on FastMCP."""

import asyncio
from typing import Any

from fastmcp import Context, FastMCP
from fastmcp.server.auth import AccessToken, TokenVerifier
from held import gate, who
from key_value.aio.stores.memory import MemoryStore
from mcp_types import NotificationParams
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ucm_middleware_mcp.fast import UserStateStore


class Answer(BaseModel):
    answer: str


class Verifier(TokenVerifier):
    async def verify_token(self, token: str) -> AccessToken | None:
        user = token.removeprefix("token-of-")
        return AccessToken(token=token, client_id="app", scopes=[], subject=user) if user != token else None


def fast_server(*, guarded: bool, by_token: bool) -> FastMCP[Any]:
    store = UserStateStore(MemoryStore()) if guarded else None
    server: FastMCP[Any] = FastMCP("notes", auth=Verifier() if by_token else None, session_state_store=store)

    @server.tool
    async def whoami() -> str:
        return who()

    @server.tool
    def whoami_sync() -> str:
        return who()

    @server.tool
    async def keep(text: str, ctx: Context) -> str:
        await ctx.set_state("kept", text)
        return who()

    @server.tool
    async def keeps(ctx: Context) -> str:
        return str(await ctx.get_state("kept") or "nothing")

    @server.tool
    async def ask(ctx: Context) -> str:
        found: Any = await ctx.elicit("your secret?", Answer)
        return str(found.data.answer)

    @server.tool
    async def hold(name: str, ctx: Context) -> str:
        before = who()
        await ctx.report_progress(1, 2, f"held for {name}")
        gate(f"{name} came").set()
        await gate(name).wait()
        return before if before == who() else f"{before} became {who()}"

    @server.tool
    async def came(name: str) -> str:
        await gate(f"{name} came").wait()
        return name

    @server.tool
    async def release(name: str) -> str:
        gate(name).set()
        return name

    @server.tool
    async def fail() -> str:
        raise ValueError("as asked")

    @server.tool
    async def announce(text: str, ctx: Context) -> str:
        await ctx.session.send_resource_updated(f"note://{text}")
        return who()

    @server.resource("note://mine")
    async def note() -> str:
        return who()

    @server.resource("note://of/{name}")
    async def note_of(name: str) -> str:
        return who()

    @server.prompt
    async def greet(name: str) -> str:
        return who()

    async def note_roots(ctx: Any, params: NotificationParams) -> None:
        await asyncio.sleep(0.01)  # the request that brought it has been answered by now
        told.append(who())

    @server.tool
    async def told_of_roots() -> list[str]:
        return told

    told: list[str] = []
    method = "notifications/roots/list_changed"
    server._mcp_server.add_notification_handler(method, NotificationParams, note_roots)

    @server.custom_route("/hello", methods=["POST"])
    async def hello(request: Request) -> Response:
        return PlainTextResponse(who())

    return server
