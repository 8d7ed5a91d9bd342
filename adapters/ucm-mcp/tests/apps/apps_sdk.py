"""The tools, on the SDK's own MCPServer."""

import asyncio
from typing import Any

from held import gate, who
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import Completion, NotificationParams
from pydantic import AnyHttpUrl, BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ucm_middleware_mcp import UserSubscriptionBus


class Answer(BaseModel):
    answer: str


class Verifier:
    async def verify_token(self, token: str) -> AccessToken | None:
        user = token.removeprefix("token-of-")
        return AccessToken(token=token, client_id="app", scopes=[], subject=user) if user != token else None


def sdk_server(*, guarded: bool, by_token: bool) -> MCPServer:
    url = AnyHttpUrl("http://127.0.0.1/")
    auth = AuthSettings(issuer_url=url, resource_server_url=None) if by_token else None
    server = MCPServer(
        "notes",
        subscriptions=UserSubscriptionBus() if guarded else None,
        auth=auth,
        token_verifier=Verifier() if by_token else None,
        log_level="WARNING",
    )
    kept: dict[str, str] = {}  # what applications write who keep something for a session

    def session(ctx: Context) -> str:
        return str((ctx.headers or {}).get("mcp-session-id"))

    @server.tool()
    async def whoami() -> str:
        return who()

    @server.tool()
    def whoami_sync() -> str:
        return who()

    @server.tool()
    async def keep(text: str, ctx: Context) -> str:
        kept[session(ctx)] = text
        return who()

    @server.tool()
    async def keeps(ctx: Context) -> str:
        return kept.get(session(ctx), "nothing")

    @server.tool()
    async def ask(ctx: Context) -> str:
        found: Any = await ctx.elicit("your secret?", Answer)
        return str(found.data.answer)

    @server.tool()
    async def hold(name: str, ctx: Context) -> str:
        before = who()
        await ctx.report_progress(1, 2, f"held for {name}")
        gate(f"{name} came").set()
        await gate(name).wait()
        return before if before == who() else f"{before} became {who()}"

    @server.tool()
    async def came(name: str) -> str:
        await gate(f"{name} came").wait()
        return name

    @server.tool()
    async def release(name: str) -> str:
        gate(name).set()
        return name

    @server.tool()
    async def fail() -> str:
        raise ValueError("as asked")

    @server.tool()
    async def touch(uri: str, ctx: Context) -> str:
        await ctx.notify_resource_updated(uri)
        return who()

    @server.tool()
    async def announce(text: str, ctx: Context) -> str:
        await ctx.session.send_resource_updated(f"note://{text}")
        return who()

    @server.resource("note://mine")
    async def note() -> str:
        return who()

    @server.resource("note://of/{name}")
    async def note_of(name: str) -> str:
        return who()

    @server.prompt()
    async def greet(name: str) -> str:
        return who()

    @server.completion()  # type: ignore[no-untyped-call, untyped-decorator]
    async def complete(ref: Any, argument: Any, context: Any) -> Completion:
        return Completion(values=[who()])

    async def note_roots(ctx: Any, params: NotificationParams) -> None:
        await asyncio.sleep(0.01)  # the request that brought it has been answered by now
        told.append(who())

    @server.tool()
    async def told_of_roots() -> list[str]:
        return told

    told: list[str] = []
    method = "notifications/roots/list_changed"
    server._lowlevel_server.add_notification_handler(method, NotificationParams, note_roots)

    @server.custom_route("/hello", methods=["POST"])  # type: ignore[untyped-decorator]
    async def hello(request: Request) -> Response:
        return PlainTextResponse(who())

    return server
