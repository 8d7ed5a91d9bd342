"""What the three users do at the desk. Each errand reports who asked and whose data came back."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from websockets.asyncio.client import connect

NOBODY = "nobody"
Row = dict[str, Any]
LOG = "the printer said: paper jam\n" * 16_000  # some 450 kB: more than a server reads at once, so it pauses reading


@dataclass(frozen=True, slots=True)
class Outcome:
    """``owners`` are those whose data came back. ``status`` is None where the asker hung up, 0 where the server did."""

    asker: str
    errand: str
    status: int | None
    owners: frozenset[str]

    @property
    def leaked_from(self) -> frozenset[str]:
        """The other users whose data the asker was given, or in whose name the asker wrote."""
        return self.owners - {self.asker}

    @property
    def failed(self) -> bool:
        """Whether the asker did not get what is theirs: users an answer, nobody a refusal."""
        if self.status is None or self.leaked_from:
            return False
        return self.status != 401 if self.asker == NOBODY else not 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens; ``client`` sends everybody's requests over a few open connections, as a proxy does."""

    client: httpx.AsyncClient
    host: str
    port: int


def headers_of(asker: str) -> dict[str, str]:
    """The asker's credentials: a bearer token, or none at all."""
    return {} if asker == NOBODY else {"Authorization": f"Bearer token-of-{asker}"}


def rows_in(body: bytes) -> list[Row]:
    """The tickets or notes in an answer, one or a list. A refusal has none, nor a failure, which is plain text."""
    answer: Row | list[Row] = json.loads(body) if body.startswith((b"{", b"[")) else []
    rows = answer if isinstance(answer, list) else [answer]
    return [row for row in rows if "owner" in row]


def owners_of(rows: list[Row]) -> frozenset[str]:
    """Whose they are."""
    return frozenset(row["owner"] for row in rows)


async def ask(
    server: Server, asker: str, errand: str, method: str, path: str, body: Row | None = None
) -> tuple[Outcome, list[Row]]:
    """One ordinary request over the shared connections."""
    response = await server.client.request(method, path, headers=headers_of(asker), json=body)
    rows = rows_in(response.content)
    return Outcome(asker, errand, response.status_code, owners_of(rows)), rows


async def list_tickets(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Look at my tickets."""
    return [(await ask(server, askers[0], "list", "GET", "/tickets"))[0]]


async def list_notes(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Look at my notes and reminders."""
    return [(await ask(server, askers[0], "notes", "GET", "/notes"))[0]]


async def create(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """File a short ticket."""
    body = {"subject": f"{askers[0]} is locked out"}
    return [(await ask(server, askers[0], "create", "POST", "/tickets", body))[0]]


async def upload(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """File a ticket with a long log attached."""
    body = {"subject": f"{askers[0]} sends a log", "log": LOG}
    return [(await ask(server, askers[0], "upload", "POST", "/tickets", body))[0]]


async def read_one(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """List, open the first ticket, and have oneself reminded of it."""
    listed, tickets = await ask(server, askers[0], "list", "GET", "/tickets")
    if not tickets:
        return [listed]
    path = f"/tickets/{tickets[0]['id']}"
    opened, _ = await ask(server, askers[0], "read", "GET", path)
    reminded, _ = await ask(server, askers[0], "remind", "POST", f"{path}/remind")
    return [listed, opened, reminded]


async def export(server: Server, askers: Sequence[str], *, lines: int | None = None) -> list[Outcome]:
    """Stream an export; with ``lines``, hang up after so many."""
    owners: set[str] = set()
    errand = "export" if lines is None else "dropped export"
    async with server.client.stream("GET", "/export", headers=headers_of(askers[0])) as response:
        status: int | None = response.status_code
        if status == 200:
            async for line in response.aiter_lines():
                owners.add(line.partition("\t")[0])
                if lines is not None:
                    status = None
                    break
    return [Outcome(askers[0], errand, status, frozenset(owners))]


async def export_dropped(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Hang up after the first line of an export."""
    return await export(server, askers, lines=1)


async def upload_dropped(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Break the connection half-way through an upload."""
    _, writer = await asyncio.open_connection(server.host, server.port)
    body = json.dumps({"subject": "never arrives", "log": LOG}).encode()
    writer.write(_request("POST", "/tickets", askers[0], {"Content-Length": str(len(body))}) + body[: len(body) // 2])
    await writer.drain()
    writer.transport.abort()
    return [Outcome(askers[0], "dropped upload", None, frozenset())]


async def pipelined(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Several askers' requests written to one connection at once, before any answer is read."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(b"".join(_request("GET", "/tickets", asker) for asker in askers))
        return [Outcome(asker, "pipelined list", *await _response(reader)) for asker in askers]
    finally:
        writer.close()
        await writer.wait_closed()


async def chat(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Say something over a WebSocket and wait until it comes back."""
    said, owners = f"{askers[0]} says hello", set[str]()
    uri = f"ws://{server.host}:{server.port}/chat"
    async with connect(uri, additional_headers=headers_of(askers[0]), proxy=None) as socket:
        await socket.send(said)
        async for message in socket:
            note = json.loads(message)
            owners.add(note["owner"])
            if note["text"] == said:
                break
    return [Outcome(askers[0], "chat", 200, frozenset(owners))]


async def chat_dropped(server: Server, askers: Sequence[str]) -> list[Outcome]:
    """Say something over a WebSocket and break the connection without a word."""
    uri = f"ws://{server.host}:{server.port}/chat"
    async with connect(uri, additional_headers=headers_of(askers[0]), proxy=None) as socket:
        await socket.send(f"{askers[0]} says goodbye")
        socket.transport.abort()
    return [Outcome(askers[0], "dropped chat", None, frozenset())]


def _request(method: str, path: str, asker: str, extra: dict[str, str] | None = None) -> bytes:
    headers = {"Host": "helpdesk", "Content-Type": "application/json"} | headers_of(asker) | (extra or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


async def _response(reader: asyncio.StreamReader) -> tuple[int, frozenset[str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].split()[0])
    return int(head.split()[1]), owners_of(rows_in(await reader.readexactly(length)))


Errand = Callable[[Server, Sequence[str]], Awaitable[list[Outcome]]]

# (errand, how many askers it takes, how often it comes up)
ERRANDS: tuple[tuple[Errand, int, int], ...] = (
    (list_tickets, 1, 20),
    (create, 1, 12),
    (upload, 1, 6),
    (read_one, 1, 8),
    (list_notes, 1, 8),
    (export, 1, 6),
    (pipelined, 4, 5),
    (chat, 1, 6),
    (export_dropped, 1, 5),
    (upload_dropped, 1, 3),
    (chat_dropped, 1, 2),
)
