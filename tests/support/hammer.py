"""Many users at many workers at once, over HTTP and WebSocket, and what they were served."""

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from .history import SLACK, History, life_of
from .observer import token_of
from .processes import HOST

BURST = 13
"""Requests of a user at once: more than are allowed."""

BURSTS = 16
"""Users who do so at the same time."""


@dataclass(frozen=True, slots=True)
class Served:
    """One answer: under which lease, from when to when its handler had the context, by the machine's clock."""

    user: str
    pid: int
    lease: str
    begin: float
    last: float


@dataclass(slots=True)
class Outcome:
    """What came of it all. ``counts`` has answers by their status, and ends of connections by their code."""

    served: list[Served] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, user: str, told: dict[str, Any]) -> None:
        self.served.append(Served(user, told["pid"], told["lease"], told["begin"], told["last"]))


class Hammer:
    """``ports`` are where the workers listen. It goes on until `stop` is set."""

    def __init__(self, ports: Sequence[int], users: int, seed: int = 1) -> None:
        self.outcome = Outcome()
        self.stop = asyncio.Event()
        self._ports = ports
        self._users = [f"user{number}" for number in range(users)]
        self._random = random.Random(seed)
        self._turns = asyncio.Semaphore(BURSTS)

    async def run(self) -> Outcome:
        """Raises what any of the users found wrong."""
        async with asyncio.TaskGroup() as group:
            for user in self._users:
                group.create_task(self._bursts(user))
                group.create_task(self._talks(user))
        return self.outcome

    async def _bursts(self, user: str) -> None:
        await asyncio.sleep(self._random.random() / 2)
        while not self.stop.is_set():
            async with self._turns:
                if self.stop.is_set():
                    return
                async with asyncio.TaskGroup() as group:
                    for _ in range(BURST):
                        group.create_task(self._request(user))
            await asyncio.sleep(self._random.random())

    async def _request(self, user: str) -> None:
        seconds = self._random.random() * 0.2
        try:
            reader, writer = await asyncio.open_connection(HOST, self._random.choice(self._ports))
        except OSError:
            self.outcome.counts["no worker"] += 1
            return
        try:
            head = f"GET /work?seconds={seconds} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
            writer.write((head + f"Authorization: {token_of(user)['Authorization']}\r\n\r\n").encode())
            answer = await reader.read()
        except OSError:
            answer = b""
        finally:
            writer.close()
        status = answer[9:12].decode()
        self.outcome.counts[status or "cut off"] += 1
        if status == "200":
            self.outcome.take(user, json.loads(answer.partition(b"\r\n\r\n")[2]))
        elif status in ("429", "503"):
            assert b"retry-after" in answer.lower(), answer

    async def _talks(self, user: str) -> None:
        """One connection after another, with a few messages on each."""
        while not self.stop.is_set():
            url = f"ws://{HOST}:{self._random.choice(self._ports)}/talk"
            try:
                async with connect(
                    url, additional_headers=token_of(user), compression=None, open_timeout=None, ping_interval=None
                ) as websocket:
                    for _ in range(self._random.randint(3, 30)):
                        await websocket.send("?")
                        self.outcome.take(user, json.loads(await websocket.recv()))
                        self.outcome.counts["messages"] += 1
                        await asyncio.sleep(self._random.random() / 2)
                        if self.stop.is_set():
                            break
            except InvalidStatus as refused:
                self.outcome.counts[f"refused with {refused.response.status_code}"] += 1
                await asyncio.sleep(0.1)
            except ConnectionClosed as closed:
                self.outcome.counts[f"closed with {None if closed.rcvd is None else closed.rcvd.code}"] += 1
            except (InvalidHandshake, OSError) as failed:
                self.outcome.counts[f"failed: {type(failed).__name__}"] += 1
                await asyncio.sleep(0.1)


async def hammer(ports: Sequence[int], users: int, seconds: float) -> Outcome:
    """Let so many users at the workers for so long."""
    many = Hammer(ports, users)
    task = asyncio.create_task(many.run())
    await asyncio.wait([task], timeout=seconds)
    many.stop.set()
    return await task


def check_served(served: Sequence[Served], history: History, wall_minus_monotonic: float) -> None:
    """Each was served under a lease that counted in the store. Raises AssertionError for one that was not."""
    for answer in served:
        life = life_of(history, answer.lease)
        assert life is not None, f"served under a lease that the store never gave: {answer}"
        begin, last = answer.begin + wall_minus_monotonic, answer.last + wall_minus_monotonic
        assert life.begin - SLACK <= begin, (answer, life)
        assert last <= life.end + SLACK, f"served under a lost lease: {answer}, {life}"


def check_uses(uses: Mapping[str, float], history: History, wall_minus_monotonic: float) -> None:
    """No context was used after its lease was over, whatever was answered then."""
    for lease, last in uses.items():
        life = life_of(history, lease)
        assert life is not None, f"used under a lease that the store never gave: {lease}"
        late = last + wall_minus_monotonic - life.end
        assert late <= SLACK, f"{lease} was used {late:.3f} s after it was lost"


def most_at_once(served: Sequence[Served]) -> int:
    """How many leases of one user were in use at once, as the handlers saw it: whatever the store thinks."""
    spans: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for answer in served:  # a connection has one lease for all of its messages, under a tenancy that may change
        worker, _, number = answer.lease.partition("-")
        lease = f"{worker}.{number.partition('.')[2]}"
        begin, last = spans[answer.user].get(lease, (answer.begin, answer.last))
        spans[answer.user][lease] = (min(begin, answer.begin), max(last, answer.last))
    most = 0
    for leases in spans.values():
        steps = sorted([(begin, 1) for begin, _ in leases.values()] + [(last, -1) for _, last in leases.values()])
        now = 0
        for _, step in steps:
            now += step
            most = max(most, now)
    return most
