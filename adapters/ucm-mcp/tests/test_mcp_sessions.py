"""Sessions on a real server: whose they are, how they end, and what becomes of calls when clients go away."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from raw_mcp import ACCEPT, INITIALIZE, VERSION, RawMCP, call, message, text_of
from served import Servers, raw, trail_of
from ucm_middleware.testing import Server

ALL = {"accept": ACCEPT, "mcp-protocol-version": VERSION}


@pytest.fixture
def server(servers: Servers, framework: str) -> Server:
    return servers(framework)


async def test_another_s_session_is_answered_like_none(server: Server) -> None:
    """Byte for byte, by the SDK itself; and only the one is put on record."""
    async with raw(server, "carol", "dave") as (carol, dave):
        session = await carol.open()
        for verb in ("POST", "GET", "DELETE"):
            answers = [await ask(dave, verb, named) for named in (session, "0" * 32)]
            assert answers[0] == answers[1]
            assert answers[0][0] == 404
        assert text_of(await carol.result(call("came", name=await released(carol)))) == "x"
    denials = [each for each in await trail_of(server, "dave") if each["event"] == "'denied'"]
    assert [each["action"] for each in denials] == ["'mcp_session'"] * 3


async def test_a_session_named_twice_is_named_not_at_all(server: Server) -> None:
    """One header is the caller's own session, the other one hers: whichever the SDK goes by, it gets neither."""
    async with raw(server, "carol", "dave") as (carol, dave):
        hers, his = await carol.open(), await dave.open()
        for pair in ((hers, his), (his, hers)):
            headers = [*dave.of(None).items(), *(("mcp-session-id", each) for each in pair)]
            answer = await dave.client.post("/mcp", json=call("whoami"), headers=headers)
            assert answer.status_code == 404


async def test_nobody_opens_no_session(server: Server) -> None:
    """And is told with 401, which is what starts a client's sign-in; without a session anybody may call."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/mcp", json=INITIALIZE, headers={"accept": ACCEPT})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        for verb in ("GET", "HEAD"):
            assert (await client.request(verb, "/older/sse", headers={"accept": ACCEPT})).status_code == 401
        nobody = RawMCP(httpx.AsyncClient(base_url=f"{server.url}/stateless"), {})
        async with nobody.client:
            ran_as = json.loads(text_of(await nobody.result(call("whoami"))))
        assert ran_as["user"].startswith("anonymous_")
        assert ran_as["depth"] == 1


async def test_a_revoked_user_s_sessions_end(server: Server) -> None:
    """The idle one, and the one with a call under way and a stream open; other users' go on."""
    async with raw(server, "erin", "erin", "frank", "erin") as (idle, busy, frank, admin):
        await idle.open()
        await busy.open()
        await frank.open()
        async with busy.stream("GET") as heard:
            held = asyncio.create_task(busy.post(call("hold", 5, name="revoked")))
            await frank.result(call("came", name="revoked"))
            async with httpx.AsyncClient(base_url=server.url) as client:
                await client.post("/revoke/erin")
            with pytest.raises(httpx.RemoteProtocolError):  # cut off in the middle
                await heard.next()
            with pytest.raises(httpx.RemoteProtocolError):
                await held
        for session in (idle, busy):
            assert await session.result(call("whoami")) == 404
        assert text_of(await frank.result(call("release", name="revoked"))) == "revoked"
        await admin.open()  # who may sign in again gets a new one
        assert text_of(await admin.result(call("release", name="again"))) == "again"
    cut = [each for each in await trail_of(server, "erin") if each.get("phase") == "'agent_failed'"]
    assert len(cut) == 1


async def test_what_has_ended_is_forgotten(server: Server) -> None:
    async with raw(server, "grace") as (grace,):
        before = await live(server)
        await grace.open()
        assert (await live(server))["sessions"] == before["sessions"] + 1
        assert (await grace.client.delete("/mcp", headers=grace.of(grace.session))).status_code == 200
        assert (await live(server))["sessions"] == before["sessions"]


async def test_a_call_ends_with_its_client(server: Server) -> None:
    async with raw(server, "heidi", "heidi") as (heidi, other):
        await heidi.open()
        await other.open()
        async with heidi.stream("POST", body=json.dumps(call("hold", 5, name="left"))):
            await other.result(call("came", name="left"))
        await until(lambda: failed(server, "heidi"))
        assert [each["reason"] for each in await failed(server, "heidi")] == ["'cancelled'"]


async def test_a_call_that_can_be_resumed_goes_on(server: Server) -> None:
    """In the context of the request that brought it, which stays open as long."""
    async with raw(server, "ivan", "ivan", on="/events") as (ivan, other):
        await ivan.open()
        await other.open()
        async with ivan.stream("POST", body=json.dumps(call("hold", 5, name="resumed"))) as answer:
            await other.result(call("came", name="resumed"))
            await answer.until_an_id()
        await other.result(call("release", name="resumed"))
        async with ivan.stream("GET", **{"last-event-id": answer.ids[0]}) as replayed:
            found = await replayed.next()
            assert found["id"] == 5
            assert json.loads(text_of(found["result"])) == {"user": "ivan", "depth": 1}


async def test_notifications_of_a_client(server: Server) -> None:
    """They are answered before they are handled; the context of their request waits for that."""
    async with raw(server, "victor") as (victor,):
        await victor.open()
        sent = await victor.post(message("notifications/roots/list_changed", number=None))
        assert sent.status_code == 202
        ran_as = json.dumps({"user": "victor", "depth": 1})

        async def told() -> bool:
            return ran_as in json.dumps(await victor.result(call("told_of_roots"))).replace("\\", "")

        await until(told)


async def test_a_call_that_takes_too_long(servers: Servers, framework: str) -> None:
    server = servers(framework, auth="token", timeout="2")
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        judy = RawMCP(client, {"authorization": "Bearer token-of-judy"})
        await judy.open()
        found = await judy.result(call("hold", 5, name="never"))
        assert found == {"code": -32001, "message": "The call took too long."}
        assert "judy" in text_of(await judy.result(call("whoami")))
    assert [each["error"] for each in await failed(server, "judy")] == ["'AgentTimeoutError'"]


async def test_a_tool_that_fails(server: Server) -> None:
    async with raw(server, "mallory") as (mallory,):
        await mallory.open()
        found = await mallory.result(call("fail"))
        assert found["isError"] is True
        odd = "no such tool " + "x" * 300
        await mallory.result(message("tools/call", {"name": odd, "arguments": {}}, 3))
    records = await trail_of(server, "mallory")
    calls = [(each["tool"], each["outcome"]) for each in records if each.get("phase") == "'tool_completed'"]
    assert calls[0] == ("'fail'", "'failed'")
    assert calls[1][0] == "'tools/call'"
    assert "no such tool" not in json.dumps(records)


@pytest.mark.parametrize("mode", ["/mcp", "/older/sse"])
async def test_users_by_the_sdk_s_own_tokens(servers: Servers, framework: str, mode: str) -> None:
    server = servers(framework, auth="token", timeout="2")
    async with httpx.AsyncClient(base_url=server.url) as client:
        ways = [RawMCP(client, {"authorization": f"Bearer token-of-{user}"}) for user in ("niaj", "olivia")]
        refused = await client.post("/mcp", json=INITIALIZE, headers=ALL)
        assert refused.status_code == 401
        assert "Bearer" in refused.headers["www-authenticate"]
        # In the framework's own words: they tell clients where to sign in.
        assert "detail" not in refused.text
        assert (await client.post("/hello")).status_code == 200  # what else it serves is nothing of ours
        if mode == "/mcp":
            niaj, olivia = ways
            session = await niaj.open()
            assert json.loads(text_of(await niaj.result(call("whoami")))) == {"user": "niaj", "depth": 1}
            assert await olivia.result(call("whoami"), session) == 404
            assert json.loads(text_of(await niaj.result(call("whoami")))) == {"user": "niaj", "depth": 1}
            # A header of the client's own says nothing.
            assert await niaj.result(call("whoami"), "0" * 32) == 404
            await client.post("/revoke/niaj")
            assert await niaj.result(call("whoami")) == 404
        else:
            assert (await client.get(mode, headers={"accept": ACCEPT})).status_code == 401


async def test_several_spellings_of_a_session(server: Server) -> None:
    """The SSE transport takes a session's id in braces, with dashes and in capitals."""
    async with (
        raw(server, "peggy", "rupert") as (peggy, rupert),
        peggy.client.stream("GET", "/older/sse", headers=peggy.headers) as stream,
    ):
        lines = stream.aiter_lines()
        endpoint = ""
        async for line in lines:
            if line.startswith("data: "):
                endpoint = line.removeprefix("data: ")
                break
        path, _, session = endpoint.partition("?session_id=")
        for spelled in (session, session.upper(), f"{{{session}}}", f"urn:uuid:{session}"):
            for way, status in ((peggy, 202), (rupert, 404)):
                url = f"{path}?session_id={spelled}"
                sent = await way.client.post(
                    url, json=message("notifications/initialized", number=None), headers=way.headers
                )
                assert sent.status_code == status
        twice = f"{path}?session_id={session}&session_id={session}"
        sent = await rupert.client.post(twice, json=call("whoami"), headers=rupert.headers)
        assert sent.status_code == 404
        odd = await rupert.client.post(f"{path}?session_id=odd", json=call("whoami"), headers=rupert.headers)
        assert odd.status_code == 400


async def ask(way: RawMCP, verb: str, session: str) -> tuple[int, bytes]:
    body = json.dumps(call("whoami")) if verb == "POST" else None
    headers = {**way.of(session), "content-type": "application/json"}
    answer = await way.client.request(verb, "/mcp", content=body, headers=headers)
    return answer.status_code, answer.content


async def released(way: RawMCP) -> str:
    """Let go what waits for "x", and say so."""
    await way.result(call("release", name="x came"))
    return "x"


async def live(server: Server) -> Any:
    async with httpx.AsyncClient(base_url=server.url) as client:
        return (await client.get("/live")).json()


async def failed(server: Server, user: str) -> list[dict[str, str]]:
    return [each for each in await trail_of(server, user) if each.get("phase") == "'agent_failed'"]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - the server is another process
            await asyncio.sleep(0.02)
