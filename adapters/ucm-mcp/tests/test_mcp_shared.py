"""What two users share whose calls are under way on a real server of the SDK: nothing."""

import asyncio
from typing import Any

import httpx
import pytest

from served import Servers, sdk_client


@pytest.mark.parametrize("mode", ["auto", "legacy", "sse"])
async def test_calls_share_nothing(servers: Servers, mode: str) -> None:
    server = servers("sdk")
    inside = asyncio.Barrier(3)

    async def use(user: str) -> None:
        async with sdk_client(server, user, mode) as client:
            name = f"shared {mode} {user}"
            held = asyncio.create_task(client.call_tool("hold", {"name": name}))
            await client.call_tool("came", {"name": name})
            await inside.wait()
            await inside.wait()
            await client.call_tool("release", {"name": name})
            await held

    async with asyncio.TaskGroup() as group, httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        for user in ("alice", "bob"):
            group.create_task(use(user))
        await inside.wait()
        report: dict[str, Any] = (await client.get("/isolation")).json()
        await inside.wait()
    assert {"alice", "bob"} <= set(report["users"])
    assert report["whole"]
    assert report["found"] == []
