"""What one user gets at by naming another's session, event or stream: bare, where all of it is to be had, and guarded.

Each test runs the same steps on both. That the bare one leaks is what makes the other one proof of anything.
"""

import asyncio
import json
from typing import Any

import pytest
from mcp import MCPError
from mcp.shared.subscriptions import ResourceUpdated

from raw_mcp import VERSION, call, message, text_of
from served import Servers, raw, sdk_client, trail_of
from ucm_middleware.testing import Server


@pytest.fixture(params=[False, True], ids=["bare", "guarded"])
def guarded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def server(servers: Servers, framework: str, guarded: bool) -> Server:
    return servers(framework, guarded=guarded)


async def test_what_a_session_keeps(server: Server, guarded: bool) -> None:
    async with raw(server, "alice", "bob") as (alice, bob):
        session = await alice.open()
        await alice.result(call("keep", text="alice's secret"))
        found = await bob.result(call("keeps"), session)
        if guarded:
            assert found == 404
        else:
            assert text_of(found) == "alice's secret"
        assert text_of(await alice.result(call("keeps"))) == "alice's secret"


async def test_what_the_server_asks_a_user(server: Server, guarded: bool) -> None:
    async with raw(server, "alice", "bob") as (alice, bob):
        session = await alice.open()
        async with alice.stream("POST", body=json.dumps(call("ask", 7))) as answer:
            asked = await answer.next()
            assert asked["method"] == "elicitation/create"
            by_bob = await bob.post(reply(asked, "bob's answer"), session)
            if guarded:
                assert by_bob.status_code == 404
                await alice.post(reply(asked, "alice's answer"))
            result = (await answer.next())["result"]
        assert text_of(result) == ("alice's answer" if guarded else "bob's answer")


async def test_ending_a_session(server: Server, guarded: bool) -> None:
    async with raw(server, "alice", "bob") as (alice, bob):
        session = await alice.open()
        ended = await bob.client.delete("/mcp", headers=bob.of(session))
        assert ended.status_code == (404 if guarded else 200)
        found = await alice.result(call("whoami"))
        assert (found == 404) is not guarded


async def test_cancelling_a_call(server: Server, guarded: bool) -> None:
    name = f"cancelled {guarded}"
    async with raw(server, "alice", "bob") as (alice, bob):
        session = await alice.open()
        held = asyncio.create_task(alice.result(call("hold", 9, name=name)))
        await alice.result(call("came", 10, name=name))
        told = await bob.post(message("notifications/cancelled", {"requestId": 9}, None), session)
        assert told.status_code == (404 if guarded else 202)
        if guarded:
            await alice.result(call("release", 11, name=name))
        found = await held
        assert ("content" in found) is guarded


async def test_the_stream_of_a_session(server: Server, guarded: bool) -> None:
    async with raw(server, "alice", "bob") as (alice, bob):
        session = await alice.open()
        async with bob.stream("GET", session) as heard:
            assert heard.status == (404 if guarded else 200)
            if not guarded:
                await alice.result(call("announce", 3, text="alices"))
                assert (await heard.next())["params"]["uri"] == "note://alices"


async def test_events_that_were_stored(server: Server, framework: str, guarded: bool) -> None:
    """By an id of the own session, or else of hers: FastMCP's store keeps sessions apart, and not users."""
    async with raw(server, "alice", "bob", on="/events") as (alice, bob):
        hers, his = await alice.open(), await bob.open()
        async with alice.stream("POST", body=json.dumps(call("keeps", 5))) as answer:
            await answer.next()
            last = answer.ids[0]
        session = his if framework == "sdk" else hers
        async with bob.stream("GET", session, **{"last-event-id": last}) as replayed:
            if not guarded:
                assert (await replayed.next())["id"] == 5
            elif framework == "sdk":
                assert await replayed.next() is None
            else:
                assert replayed.status == 404
        if guarded and framework == "sdk":
            assert any(each.get("type") == "'mcp_replay'" for each in await trail_of(server, "bob"))
        async with alice.stream("GET", hers, **{"last-event-id": last}) as replayed:
            assert (await replayed.next())["id"] == 5


async def test_state_under_an_id_that_a_header_says(server: Server, guarded: bool) -> None:
    """Without sessions FastMCP keeps state under whatever the client's header names, and so do many applications."""
    async with raw(server, "alice", "bob", on="/stateless") as (alice, bob):
        await alice.result(call("keep", text="alice's secret"), "a-session")
        found = text_of(await bob.result(call("keeps"), "a-session"))
        assert found == ("nothing" if guarded else "alice's secret")


async def test_what_subscribers_hear(server: Server, framework: str, guarded: bool) -> None:
    """The protocol of 2026, where a request of its own listens. FastMCP serves none of it, and says so."""
    if framework == "fastmcp":
        async with sdk_client(server, "alice") as alice:
            with pytest.raises(MCPError, match="Method not found"):
                async with alice.listen(resource_subscriptions=["note://alice"]):
                    pass
        return
    async with (
        sdk_client(server, "alice") as alice,
        sdk_client(server, "bob") as bob,
        alice.listen(resource_subscriptions=["note://alice", "note://bob"]) as hers,
        bob.listen(resource_subscriptions=["note://alice", "note://bob"]) as his,
    ):
        await alice.call_tool("touch", {"uri": "note://alice"})
        assert await anext(aiter(hers)) == ResourceUpdated(uri="note://alice")
        await bob.call_tool("touch", {"uri": "note://bob"})
        # The first that he hears: in one stream events keep their order.
        assert await anext(aiter(his)) == ResourceUpdated(uri="note://bob" if guarded else "note://alice")


async def test_the_older_transport(server: Server, guarded: bool) -> None:
    """Over SSE the request that brings a call ends before the call begins: bare, it runs in a context that has closed,
    or, named by somebody else, in hers.
    """
    async with (
        raw(server, "alice", "bob") as (alice, bob),
        alice.client.stream("GET", "/older/sse", headers=alice.headers) as stream,
    ):
        lines = stream.aiter_lines()
        endpoint = await data(lines)
        await alice.client.post(endpoint, json=INITIALIZE_SSE, headers=alice.headers)
        await data(lines)
        await alice.client.post(endpoint, json=message("notifications/initialized", number=None), headers=alice.headers)
        by_bob = await bob.client.post(endpoint, json=call("whoami", 2), headers=bob.headers)
        assert by_bob.status_code == (404 if guarded else 202)
        if not guarded:
            assert json.loads(await data(lines))["id"] == 2  # to alice
        await alice.client.post(endpoint, json=call("whoami", 3), headers=alice.headers)
        answer = json.loads(await data(lines))
        assert answer["id"] == 3
        ran_as = json.loads(text_of(answer["result"]))
        assert ran_as == ({"user": "alice", "depth": 1} if guarded else {"user": "ContextClosedError", "depth": -1})


INITIALIZE_SSE: dict[str, Any] = message(
    "initialize",
    {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}},
    0,
)


async def data(lines: Any) -> str:
    async for line in lines:
        if line.startswith("data: "):
            return str(line.removeprefix("data: "))
    raise AssertionError("the stream has ended")


def reply(asked: dict[str, Any], text: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": asked["id"], "result": {"action": "accept", "content": {"answer": text}}}
