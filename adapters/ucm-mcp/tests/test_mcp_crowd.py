"""Fifty users at once on a real server, with the real clients of both frameworks: each gets what is theirs."""

import asyncio
import json
from typing import Any

import mcp_types as types
import pytest

from served import Servers, fast_client, sdk_client, trail_of
from ucm_middleware.testing import Server

USERS = [f"user-{number}" for number in range(50)]
MODES = ("auto", "legacy", "sse")


def secret_of(user: str) -> str:
    return f"secret-of-{user}-"


@pytest.fixture
def server(servers: Servers, framework: str) -> Server:
    return servers(framework)


@pytest.mark.parametrize("mode", MODES)
async def test_fifty_users_of_the_sdk_s_client(server: Server, framework: str, mode: str) -> None:
    async def use(user: str) -> None:
        told: list[str | None] = []

        async def answer(_: Any, asked: types.ElicitRequestParams) -> types.ElicitResult:
            return types.ElicitResult(action="accept", content={"answer": secret_of(user)})

        async def note(progress: float, total: float | None, message: str | None) -> None:
            told.append(message)

        ran_as = {"user": user, "depth": 1}
        async with sdk_client(server, user, mode, elicitation_callback=answer) as client:
            for tool in ("whoami", "whoami_sync"):
                assert json.loads(text_of(await client.call_tool(tool, {}))) == ran_as
            uri = f"note://of/{user}" if mode == "auto" else "note://mine"
            assert json.loads((await client.read_resource(uri)).contents[0].text) == ran_as  # type: ignore[union-attr]
            prompt = await client.get_prompt("greet", {"name": user})
            assert json.loads(prompt.messages[0].content.text) == ran_as  # type: ignore[union-attr]
            if framework == "sdk" and mode == "auto":
                ref = types.PromptReference(name="greet")
                completed = await client.complete(ref, {"name": "name", "value": "a"})
                assert json.loads(completed.completion.values[0]) == ran_as
            name = f"{mode} {framework} {user}"
            held = asyncio.create_task(client.call_tool("hold", {"name": name}, progress_callback=note))
            await client.call_tool("came", {"name": name})
            await client.call_tool("release", {"name": name})
            assert json.loads(text_of(await held)) == ran_as
            assert told == [f"held for {name}"]
            if mode != "auto":  # what has sessions
                assert text_of(await client.call_tool("ask", {})) == secret_of(user)
                if (framework, mode) != ("sdk", "sse"):
                    await client.call_tool("keep", {"text": secret_of(user)})
                    assert text_of(await client.call_tool("keeps", {})) == secret_of(user)

    await asyncio.gather(*map(use, USERS))
    await nobody_knows_secrets(server)


@pytest.mark.parametrize(("framework", "mode"), [("fastmcp", "auto"), ("fastmcp", "legacy")])
async def test_fifty_users_of_fastmcp_s_client(server: Server, mode: str) -> None:
    async def use(user: str) -> None:
        async def answer(*_: Any) -> Any:
            return {"answer": secret_of(user)}

        ran_as = {"user": user, "depth": 1}
        async with fast_client(server, user, mode, elicitation_handler=answer) as client:
            for tool in ("whoami", "whoami_sync"):
                found: Any = await client.call_tool(tool, {})
                assert json.loads(found.content[0].text) == ran_as
            resource: Any = await client.read_resource("note://mine")
            assert json.loads(resource[0].text) == ran_as
            prompt: Any = await client.get_prompt("greet", {"name": user})
            assert json.loads(prompt.messages[0].content.text) == ran_as
            if mode == "legacy":
                found = await client.call_tool("ask", {})
                assert found.content[0].text == secret_of(user)
                await client.call_tool("keep", {"text": secret_of(user)})
                found = await client.call_tool("keeps", {})
                assert found.content[0].text == secret_of(user)

    await asyncio.gather(*map(use, USERS))
    await nobody_knows_secrets(server)


async def nobody_knows_secrets(server: Server) -> None:
    """What was answered and kept is on nobody's record, and runs are on their own user's."""
    for user in USERS[::10]:
        records = await trail_of(server, user)
        assert "secret-of" not in json.dumps(records)
        runs = [each for each in records if each.get("phase") == "'agent_completed'"]
        assert runs
        assert {each["agent"] for each in runs} == {"'mcp:notes'"}
        tools = {each["tool"] for each in records if each.get("phase") == "'tool_completed'"}
        assert {"'whoami'", "'whoami_sync'", "'resources/read'", "'prompts/get'"} <= tools
        assert not [each for each in records if each["outcome"] == "'denied'"]


def text_of(result: Any) -> str:
    return str(result.content[0].text)
