"""One handler, to be served by any server.

Whoever connects as "driver" can have a lot of events sent from in here, by tasks and by threads at once.
"""

import asyncio
import json
import os
import random
import threading
import time
from typing import Any, TypedDict, cast

from fastapi import FastAPI, WebSocket

from ucm_middleware import (
    EVERYONE,
    EventPolicy,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
)
from ucm_middleware.events.policy import WhenFull
from ucm_middleware.websocket.starlette import messages

DRIVER = "driver"
HOT_SHARE = 0.1
"""Of the events, so many are for the users of whom there are few."""

policy = EventPolicy(
    when_full=cast(WhenFull, os.environ["WHEN_FULL"]),
    keep_events=2000,
    keep_bytes=int(os.environ["KEEP_BYTES"]),
    keep_total_bytes=2**28,
)
manager = UserContextManager(events=policy)


class Order(TypedDict):
    """So many events by so many tasks and threads. The first of the users are hot, and get bigger ones."""

    users: list[str]
    events: int
    tasks: int
    threads: int
    hot: int
    hot_size: int


class Sender:
    """Sends events to users at random, and counts for each of them."""

    def __init__(self, order: Order, number: int) -> None:
        self.by = number
        self.count = order["events"] // (order["tasks"] + order["threads"])
        self.last: dict[str, int] = {}
        self._order = order
        self._random = random.Random(number)
        self._sent: dict[str, int] = {}

    def next(self) -> tuple[str, dict[str, Any]]:
        users, hot = self._order["users"], self._order["hot"]
        is_hot = hot > 0 and self._random.random() < HOT_SHARE
        user = self._random.choice(users[:hot] if is_hot else users)
        number = self._sent[user] = self._sent.get(user, -1) + 1
        return user, {"to": user, "by": self.by, "n": number, "pad": "x" * self._order["hot_size"] if is_hot else ""}

    async def send(self) -> None:
        for _ in range(self.count):
            user, data = self.next()
            self.last[user] = (await manager.send_event(user, "message", data)).sequence

    def post(self) -> None:
        with manager.privileged(reason="a thread of the driver", users=EVERYONE):
            for _ in range(self.count):
                user, data = self.next()
                self.last[user] = manager.post_event(user, "message", data).sequence


async def drive(order: Order) -> dict[str, Any]:
    """Returns the sequence of each user's last event, and the seconds that it took."""
    began = time.perf_counter()
    by_tasks = [Sender(order, number) for number in range(order["tasks"])]
    by_threads = [Sender(order, order["tasks"] + number) for number in range(order["threads"])]
    threads = [threading.Thread(target=sender.post) for sender in by_threads]
    for thread in threads:
        thread.start()
    with manager.privileged(reason="the tasks of the driver", users=EVERYONE):
        await asyncio.gather(*(sender.send() for sender in by_tasks))
    for thread in threads:
        await asyncio.to_thread(thread.join)
    last: dict[str, int] = {}
    for sender in (*by_tasks, *by_threads):
        for user, sequence in sender.last.items():
            last[user] = max(last.get(user, 0), sequence)
    return {"last": last, "seconds": time.perf_counter() - began}


async def flood(users: list[str], count: int, size: int) -> dict[str, Any]:
    """Send each of these users so many events of that size. Returns why how many were dropped."""
    dropped: dict[str, int] = {}

    async def send(user: str) -> None:
        for _ in range(count):
            for lost in (await manager.send_event(user, "message", "x" * size)).dropped:
                dropped[lost.why] = dropped.get(lost.why, 0) + 1

    with manager.privileged(reason="the driver floods", users=EVERYONE):
        await asyncio.gather(*(send(user) for user in users))
    return dropped


async def answer(message: str) -> str:
    if current_context().user_id != DRIVER:
        return message
    order = json.loads(message)
    return json.dumps(await (flood(**order["flood"]) if "flood" in order else drive(order["drive"])))


def user_of(token: str) -> str | None:
    return token.removeprefix("token-of-")


inner = FastAPI()


@inner.websocket("/")
async def listen(websocket: WebSocket) -> None:
    async for message in messages(websocket):
        await websocket.send_text(await answer(message))


identify = bearer_token(user_of)
app = UserContextMiddleware(inner, manager=manager, identify=identify)
