"""MCP over HTTP by hand: for what no client of the protocol would do."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx

VERSION = "2025-11-25"
ACCEPT = "application/json, text/event-stream"


def message(method: str, params: dict[str, Any] | None = None, number: int | None = 1) -> dict[str, Any]:
    """A request, or a notification where it has no id."""
    made: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if number is not None:
        made["id"] = number
    if params is not None:
        made["params"] = params
    return made


def call(tool: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    return message("tools/call", {"name": tool, "arguments": arguments}, number)


INITIALIZE = message(
    "initialize",
    {"protocolVersion": VERSION, "capabilities": {"elicitation": {}}, "clientInfo": {"name": "raw", "version": "1"}},
    0,
)


class RawMCP:
    """One user's way to one endpoint."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self.client = client
        self.headers = {"accept": ACCEPT, "mcp-protocol-version": VERSION, **headers}
        self.session: str | None = None

    def of(self, session: str | None, **more: str) -> dict[str, str]:
        named = {} if session is None else {"mcp-session-id": session}
        return {**self.headers, **named, **more}

    async def open(self) -> str:
        """Open a session, and say which."""
        headers = {name: value for name, value in self.headers.items() if name != "mcp-protocol-version"}
        answer = await self.client.post("/mcp", json=INITIALIZE, headers=headers)
        assert answer.status_code == 200, answer.text
        self.session = answer.headers["mcp-session-id"]
        answered = await self.post(message("notifications/initialized", number=None))
        assert answered.status_code == 202, answered.text
        return self.session

    async def post(self, body: dict[str, Any], session: str | None = None, **more: str) -> httpx.Response:
        return await self.client.post("/mcp", json=body, headers=self.of(session or self.session, **more))

    async def result(self, body: dict[str, Any], session: str | None = None) -> Any:
        """What a request is answered with: the result, or the error."""
        answer = await self.post(body, session)
        return answered(answer.text, body["id"]) if answer.status_code == 200 else answer.status_code

    @asynccontextmanager
    async def stream(self, method: str, session: str | None = None, **more: str) -> AsyncGenerator["Events"]:
        """An open answer of events, as a GET or (with ``body``) a POST brings it."""
        body = more.pop("body", None)
        headers = self.of(session or self.session, **more)
        if body is not None:
            headers["content-type"] = "application/json"
        async with self.client.stream(method, "/mcp", headers=headers, content=body) as answer:
            yield Events(answer)


class Events:
    """The messages of an open answer, one after another."""

    def __init__(self, answer: httpx.Response) -> None:
        self.status = answer.status_code
        self.answer = answer
        self.ids: list[str] = []
        self._lines = answer.aiter_lines()

    async def until_an_id(self) -> None:
        """Read on until an event has said its id: the stream can be resumed from there."""
        async for line in self._lines:
            if line.startswith("id: "):
                self.ids.append(line.removeprefix("id: "))
                return

    async def next(self) -> Any:
        """The next message; None at the end."""
        async for line in self._lines:
            name, _, value = line.partition(": ")
            if name == "id":
                self.ids.append(value)
            elif name == "data" and value:
                return json.loads(value)
        return None


def answered(text: str, number: int) -> Any:
    """The answer to a request, out of a body of JSON or of events."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith(("data: {", "{"))]
    for found in map(json.loads, lines):
        if found.get("id") == number and "method" not in found:
            return found.get("result", found.get("error"))
    raise AssertionError(f"no answer to {number} in {text!r}")


def text_of(result: Any) -> str:
    """The text that a tool returned."""
    return str(result["content"][0]["text"])
