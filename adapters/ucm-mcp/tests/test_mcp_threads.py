"""Synchronous functions run in threads that nothing can stop: one that outlives its call is listed until it ends."""

import asyncio
import threading
from typing import Any

import pytest
from fastmcp import Client as FastClient
from fastmcp import FastMCP
from mcp import Client
from mcp.server.mcpserver import MCPServer

from support.waiting import wait_until
from ucm_middleware import (
    ContextClosedError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    managed_user_context,
)
from ucm_middleware_mcp import MCP

LATE = ("tool", "resource", "template", "prompt")


class Slow:
    """A function that goes on until it is let, and what became of it then."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.let = threading.Event()
        self.said: list[str] = []
        self.context: UserExecutionContext | None = None

    def __call__(self) -> str:
        self.context = context = current_context()
        self.came.set()
        self.let.wait(20)
        try:
            context.require_usable()
        except ContextClosedError as error:
            self.said.append(type(error).__name__)
            raise
        return "in time"


def with_functions(server: Any, slow: Slow) -> Any:
    """The same functions on either framework, those of each kind that it has."""

    def tool() -> str:
        return slow()

    def prompt() -> str:
        return slow()

    def resource() -> str:
        return slow()

    def template(name: str) -> str:
        return slow()

    server.tool()(tool)
    server.prompt()(prompt)
    server.resource("note://resource")(resource)
    server.resource("note://of/{name}")(template)
    return server


def on_the_sdk(slow: Slow) -> tuple[Any, Any]:
    server = MCPServer("notes")
    return server, lambda: Client(with_functions(server, slow))  # registered after app()


def on_fastmcp(slow: Slow) -> tuple[Any, Any]:
    server: Any = FastMCP("notes")
    return server, lambda: FastClient(with_functions(server, slow))


def mounted(slow: Slow) -> tuple[Any, Any]:
    server: Any = FastMCP("notes")
    inner: Any = with_functions(FastMCP("inner"), slow)

    def client() -> Any:
        server.mount(inner)
        return FastClient(server)

    return server, client


@pytest.mark.parametrize("made", [on_the_sdk, on_fastmcp, mounted])
@pytest.mark.parametrize("kind", LATE)
async def test_a_thread_that_outlives_its_call_is_listed(made: Any, kind: str) -> None:
    slow = Slow()
    mcp = MCP()
    manager = UserContextManager(plugins=[mcp])
    server, client_of = made(slow)
    mcp.app(server)
    async with managed_user_context(manager.create_isolated_context("alice")), client_of() as client:
        try:
            call = asyncio.create_task(asked(client, kind))
            await asyncio.to_thread(slow.came.wait, 20)
            assert slow.context is not None
            slow.context.close("expired")  # as its deadline does
            with pytest.raises(Exception, match="has run out"):
                await call
            listed = manager.get_stragglers()
            shown = {"tool": "tool", "prompt": "prompts/get"}.get(kind, "resources/read")
            assert [(one.user_id, one.agent, one.tool) for one in listed] == [("alice", "mcp:notes", shown)]
        finally:
            slow.let.set()
        wait_until(lambda: not manager.get_stragglers(), "the thread has ended")
        assert slow.said == ["ContextClosedError"]
        # What is in time is nobody's straggler, and runs as often as it is asked for.
        for _ in range(2):
            assert "in time" in str(await asked(client, kind))
        trail = manager.get_audit_trail("alice")
    assert trail is not None
    ends = [event for event in trail["events"] if event.get("phase") == "agent_failed"]
    assert [event["stragglers"] for event in ends] == [1]


async def asked(client: Any, kind: str) -> Any:
    if kind == "tool":
        return await client.call_tool("tool", {})
    if kind == "prompt":
        return await client.get_prompt("prompt", {})
    return await client.read_resource("note://resource" if kind == "resource" else "note://of/alice")


async def test_what_runs_on_the_loop_is_as_it_was() -> None:
    """And so are functions of a server that no adapter serves."""
    server: Any = MCPServer("notes")

    async def here() -> str:
        return threading.current_thread().name

    def there(number: int = 1) -> str:
        """Says where."""
        return f"{number} {threading.current_thread().name}"

    for function in (here, there):
        server.tool()(function)
    mcp = MCP()
    mcp.app(server)
    before = {tool.name: (tool.fn, tool.parameters) for tool in server._tool_manager.list_tools()}
    manager = UserContextManager(plugins=[mcp])
    async with managed_user_context(manager.create_isolated_context("alice")), Client(server) as client:
        found: Any = await client.call_tool("here", {})
        assert found.content[0].text == threading.current_thread().name
        found = await client.call_tool("there", {"number": 2})
        assert found.content[0].text.startswith("2 ")
        shown = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
    after = {tool.name: tool.fn for tool in server._tool_manager.list_tools()}
    assert after["here"] is before["here"][0]
    assert after["there"](3).startswith("3 ")
    assert shown == {name: parameters for name, (_, parameters) in before.items()}
