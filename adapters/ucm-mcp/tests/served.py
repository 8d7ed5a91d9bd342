"""The test application on a real uvicorn, and ways to it."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
from fastmcp import Client as FastClient
from fastmcp.client.transports import SSETransport, StreamableHttpTransport
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

from raw_mcp import RawMCP
from ucm_middleware.testing import Server, start_server

FRAMEWORKS = ("sdk", "fastmcp")


class Servers:
    """The servers that the tests asked for, each started once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._started: dict[tuple[tuple[str, str], ...], Server] = {}

    def __call__(self, framework: str, *, guarded: bool = True, **more: str) -> Server:
        """The application on that framework; ``more`` are its settings."""
        env = {
            "NOTES_FRAMEWORK": framework,
            "NOTES_GUARDED": str(int(guarded)),
            "UCM_ENVIRONMENT": "testing",
            "FASTMCP_CHECK_FOR_UPDATES": "off",
            **{f"NOTES_{name.upper()}": value for name, value in more.items()},
        }
        asked = tuple(sorted(env.items()))
        if asked not in self._started:
            app_dir = Path(__file__).parent / "apps"
            self._started[asked] = self._stack.enter_context(start_server("mcp_app:app", app_dir=app_dir, env=env))
        return self._started[asked]


@asynccontextmanager
async def raw(server: Server, *users: str, on: str = "") -> AsyncGenerator[list[RawMCP]]:
    """Each of the users by hand, on one of the application's transports."""
    async with httpx.AsyncClient(base_url=server.url + on, timeout=20) as client:
        yield [RawMCP(client, {"user": user}) for user in users]


def plain_http(
    headers: dict[str, str] | None = None,
    timeout: httpx2.Timeout | None = None,
    auth: httpx2.Auth | None = None,
    **_: Any,
) -> httpx2.AsyncClient:
    """A client without the certificates that nobody here needs, and with the patience for fifty at once."""
    return httpx2.AsyncClient(headers=headers, auth=auth, timeout=httpx2.Timeout(60), verify=False)


@asynccontextmanager
async def sdk_client(server: Server, user: str, mode: Any = "auto", **options: Any) -> AsyncGenerator[Client]:
    """The SDK's own client, as a user."""
    if mode == "sse":
        sse = sse_client(f"{server.url}/older/sse", {"user": user}, httpx_client_factory=plain_http)
        async with Client(sse, mode="legacy", **options) as client:
            yield client
        return
    async with plain_http({"user": user}) as http:
        transport = streamable_http_client(f"{server.url}/mcp", http_client=http)
        async with Client(transport, mode=mode, **options) as client:
            yield client


@asynccontextmanager
async def fast_client(server: Server, user: str, mode: Any = "auto", **options: Any) -> AsyncGenerator[FastClient[Any]]:
    """FastMCP's client, as a user."""
    made = (
        SSETransport(f"{server.url}/older/sse", headers={"user": user}, httpx_client_factory=plain_http)
        if mode == "sse"
        else StreamableHttpTransport(f"{server.url}/mcp", headers={"user": user}, httpx_client_factory=plain_http)
    )
    async with FastClient(made, mode="legacy" if mode == "sse" else mode, **options) as client:
        yield client


async def trail_of(server: Server, user: str) -> list[dict[str, str]]:
    """The records of a user, their values as text."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        found: list[dict[str, str]] = (await client.get(f"/trail/{user}")).json()
    return found
