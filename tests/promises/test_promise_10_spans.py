"""Promise 10, the spans: an OTLP receiver gets every record of the ledger on one span, from a real server.

The ledger is a sealed file, and read as docs/how-to/tracing.md says.

A client that switches the sampling off, forges baggage or sends a giant header keeps its full trail in the ledger.
"""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import get_args

import pytest
import pytest_asyncio
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.observer import client, token_of
from support.raw_http import RawConnection, build_request
from support.servers import Server, start_server
from support.tracing import RECORD_KEYS
from support.waiting import PATIENCE
from ucm_middleware.audit.records import Event

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "how-to" / "tracing.md"

ALICE = "alice@example.com"
USERS = ALICE, "bob@example.com", "carol@example.com", "dave@example.com"
SECRET = "y7J3kq0Zt5vW8xB2nM4pL6sD9fG1hQeR"  # of these tests alone

Line = tuple[str, str, str, str]
"""A record: event, record id, trace id, span id."""


class Receiver:
    """An OTLP receiver, and all the spans that it got."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.spans: list[Span] = []
        self._tap = OtelTapHttpProtobufReceiver(OtelTapHttpProtobufReceiverSettings(http_port=port))
        self._more = asyncio.Condition()

    async def collect(self, started: asyncio.Event) -> None:
        stream = self._tap.stream_traces()
        following = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # the stream is subscribed once it has begun
        async with self._tap:
            started.set()
            while True:
                span = await following
                following = asyncio.ensure_future(anext(stream))
                async with self._more:
                    self.spans.append(span)
                    self._more.notify_all()

    async def wait_for(self, name: str, times: int = 1) -> None:
        """Until so many spans of this name are there, and so all before: a batch keeps its order."""
        async with asyncio.timeout(PATIENCE), self._more:
            await self._more.wait_for(lambda: [span.name for span in self.spans].count(name) >= times)

    def records(self) -> list[Line]:
        """What the spans say of records, sorted."""
        found: list[Line] = []
        for span in self.spans:
            about = attributes(span)
            for key in RECORD_KEYS:
                if key in about:
                    event = "closed" if key == "ucm.record.closed_id" else about["ucm.event"]
                    found.append((event, about[key], span.trace_id.hex(), span.span_id.hex()))
        return sorted(found)


def attributes(span: Span) -> dict[str, str]:
    """The attributes that are text."""
    return {item.key: item.value.string_value for item in span.attributes if item.value.HasField("string_value")}


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    receiver = Receiver(port)
    started = asyncio.Event()
    collecting = asyncio.ensure_future(receiver.collect(started))
    await asyncio.wait({collecting, asyncio.ensure_future(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    yield receiver
    collecting.cancel()
    await asyncio.wait({collecting})


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A folder for a ledger and its keys, by the names that they have in the guide."""
    return tmp_path


def records(ledger: Path) -> list[Line]:
    """The records of the ledger, sorted; exported by the command in the guide."""
    [command] = re.findall(r"```sh\n(.*?)\n```", GUIDE.read_text(), re.DOTALL)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ledger,
        env={**os.environ, "PATH": path, "UCM_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    exported = [json.loads(line) for line in (ledger / "ledger.jsonl").read_text().splitlines()]
    return sorted((record["event"], record["id"], record["trace"], record["span"]) for record in exported)


async def serve(
    servers: ServerFactory, receiver: Receiver, ledger: Path, drive: Callable[[Server], None], app: str = "app"
) -> None:
    """Run the app, drive it, end it, and wait until the receiver has got everything."""
    endpoint = f"http://127.0.0.1:{receiver.port}"
    env = {
        "LEDGER": str(ledger / "ledger.db"),
        "KEYS": str(ledger / "keys.db"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "UCM_SECRET": SECRET,
    }
    server = await asyncio.to_thread(servers, "uvicorn-httptools", f"promise_tracing:{app}", env=env)
    await asyncio.to_thread(drive, server)
    await asyncio.to_thread(server.stop)


def everything(server: Server) -> None:
    """Each thing that can happen to a context, over HTTP and a WebSocket."""
    alice = token_of(ALICE)
    with client(server) as http:
        for path, headers, status in (
            ("/who", alice, 200),
            ("/who", {}, 200),
            ("/who", {"Authorization": "Bearer forged"}, 401),
            ("/theirs", alice, 403),
            ("/login", {}, 200),
            ("/work", alice, 200),
            ("/hold", alice, 200),
            ("/pay", alice, 200),
            ("/outstay", alice, 200),
            ("/sign_out", alice, 200),
            ("/inspect", alice, 200),
            ("/crowd", alice, 429),
            ("/nowhere", token_of(USERS[1]), 404),
        ):
            assert http.get(path, headers=headers).status_code == status, path
    with connect(f"{server.ws_url}/talk", additional_headers=token_of(USERS[1])) as websocket:
        for text in ("hello", "theirs", "goodbye"):
            websocket.send(text)
            assert websocket.recv() == f"you said {text}"


async def test_a_receiver_gets_every_record_on_one_span(
    server_factory: ServerFactory, receiver: Receiver, ledger: Path
) -> None:
    await serve(server_factory, receiver, ledger, everything)
    await receiver.wait_for("the end")
    lines = records(ledger)
    assert receiver.records() == lines
    assert len({record_id for _, record_id, _, _ in lines}) == len(lines)
    # Of a user who was erased no server tells: the record is of whoever runs `ucm audit erase`. Nothing leaks here, and
    # there is no cluster.
    assert {line[0] for line in lines} == set(get_args(Event)) - {"cluster", "egress", "erased", "outlived"}
    names = [span.name for span in receiver.spans]
    assert names.count("ucm message") == 3
    assert names.count("invoke_agent planner") == 1
    [connection] = [span for span in receiver.spans if span.name == "ucm connection"]
    [welcome] = [span for span in receiver.spans if span.name == "ucm event_sent"]
    assert welcome.parent_span_id == b""
    assert [link.span_id for link in welcome.links] == [connection.span_id]


async def test_there_is_one_server_span_for_each_request_and_the_context_s_is_below_it(
    server_factory: ServerFactory, receiver: Receiver, ledger: Path
) -> None:
    await serve(server_factory, receiver, ledger, everything)
    await receiver.wait_for("the end")
    servers = {span.span_id: span for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER}
    assert len(servers) == 14
    contexts = [span for span in receiver.spans if attributes(span).get("ucm.event") == "opened"]
    from_requests = [span for span in contexts if span.name in ("ucm context", "ucm connection")]
    assert [span.parent_span_id in servers for span in from_requests].count(True) == 13  # one was refused
    assert all(span.kind == Span.SPAN_KIND_INTERNAL for span in contexts)


@pytest.mark.security
async def test_no_user_is_named_in_what_is_exported(
    server_factory: ServerFactory, receiver: Receiver, ledger: Path
) -> None:
    await serve(server_factory, receiver, ledger, everything)
    await receiver.wait_for("the end")
    exported = b"".join(span.SerializeToString() for span in receiver.spans)
    assert b"enduser.pseudo.id" in exported
    for user in USERS:
        assert user.encode() not in exported


@pytest.mark.security
async def test_a_client_cannot_switch_its_trail_off(
    server_factory: ServerFactory, receiver: Receiver, ledger: Path
) -> None:
    forged = {"baggage": "enduser.id=mallory,user_id=mallory", "x-giant": "x" * 65536}
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    answers: list[dict[str, object]] = []

    def drive(server: Server) -> None:
        with client(server) as http:
            for flags in ("00", "01"):
                headers = {**token_of(ALICE), **forged, "traceparent": f"00-{trace_id}-b7ad6b7169203331-{flags}"}
                answers.append(http.get("/who", headers=headers).json())

    await serve(server_factory, receiver, ledger, drive)
    await receiver.wait_for("the end")
    assert answers == [{"user": ALICE, "baggage": {}, "trace": trace_id}] * 2
    lines = records(ledger)
    assert [line[0] for line in lines] == ["answered", "answered", "closed", "closed", "opened", "opened"]
    assert {line[2] for line in lines} == {trace_id}
    # The one that asked for it is exported, below its server span; the other is in the ledger alone.
    assert set(receiver.records()) < set(lines)
    [context] = [span for span in receiver.spans if span.name == "ucm context"]
    [server] = [span for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert context.parent_span_id == server.span_id
    assert server.parent_span_id.hex() == "b7ad6b7169203331"
    assert b"mallory" not in b"".join(span.SerializeToString() for span in receiver.spans)


@pytest.mark.security
async def test_a_span_left_behind_on_the_connection_is_no_parent(
    server_factory: ServerFactory, receiver: Receiver, ledger: Path
) -> None:
    answers: list[dict[str, str | None]] = []

    def drive(server: Server) -> None:
        with RawConnection(server) as connection:
            requests = [build_request("/left", headers=token_of(user)) for user in USERS[:2]]
            answers.extend(response.json() for response in connection.pipeline(*requests))

    await serve(server_factory, receiver, ledger, drive, app="leaky")
    alices, bobs = answers
    assert int(str(bobs["left_behind"]), 16), "nothing was left behind: this proves nothing"
    assert bobs["trace"] != bobs["left_behind"]
    assert (alices["parent"], bobs["parent"]) == (None, None)


async def test_the_example_shows_what_its_readme_says(receiver: Receiver) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}", "UCM_SECRET": SECRET}

    def run() -> str:
        with start_server("uvicorn-httptools", "examples.tracing.app:app", app_dir=ROOT, env=env) as server:
            drive = [sys.executable, "-m", "examples.tracing.drive"]
            where = {**os.environ, "ASSISTANT": f"127.0.0.1:{server.port}"}
            return subprocess.run(
                drive, cwd=ROOT, env=where, capture_output=True, text=True, timeout=60, check=True
            ).stdout

    said = await asyncio.to_thread(run)
    assert "bob GET /notes/alice: 403" in said
    await receiver.wait_for("ucm close", 2)
    names = [span.name for span in receiver.spans]
    counts = {name: names.count(name) for name in ("GET /ask", "invoke_agent planner", "ucm denied", "ucm message")}
    assert counts == {"GET /ask": 2, "invoke_agent planner": 2, "ucm denied": 1, "ucm message": 4}
    contexts = [attributes(span) for span in receiver.spans if attributes(span).get("ucm.event") == "opened"]
    assert len({about["enduser.pseudo.id"] for about in contexts}) == 2
