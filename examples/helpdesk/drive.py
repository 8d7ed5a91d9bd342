"""Drive the help desk as three users at once, and as somebody without a token, over connections they share."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import httpx
from websockets.exceptions import WebSocketException

from examples.helpdesk.errands import ERRANDS, NOBODY, Errand, Outcome, Server, chat, chat_dropped
from examples.helpdesk.store import USERS

CONNECTIONS = 4  # kept open towards the server, for everybody
AT_ONCE = 10  # errands under way at any moment

Task = tuple[Errand, Sequence[str]]
"""An errand, and those who go on it."""


@dataclass(slots=True)
class Tally:
    """What the drive saw."""

    outcomes: list[Outcome] = field(default_factory=list[Outcome])

    @property
    def leaks(self) -> list[Outcome]:
        """The answers that carried another user's data."""
        return [outcome for outcome in self.outcomes if outcome.leaked_from]

    @property
    def failures(self) -> list[Outcome]:
        """The answers that were neither a leak nor what the asker should get."""
        return [outcome for outcome in self.outcomes if outcome.failed]

    def shown(self) -> dict[str, Counter[str]]:
        """For each asker, how many answers carried whose data. An answer without any counts as nobody's."""
        table = {asker: Counter[str]() for asker in (*USERS, NOBODY)}
        for outcome in self.outcomes:
            table[outcome.asker].update(outcome.owners or {NOBODY})
        return table


def plan(requests: int, seed: int) -> list[Task]:
    """Errands worth at least ``requests`` requests: each kind once, then by weight; ``seed`` decides the order."""
    rng = random.Random(seed)
    chosen = list(ERRANDS)
    while sum(size for _, size, _ in chosen) < requests:
        chosen += rng.choices(ERRANDS, weights=[weight for _, _, weight in ERRANDS])
    rng.shuffle(chosen)
    return [(errand, _askers(errand, size, rng)) for errand, size, _ in chosen]


def _askers(errand: Errand, size: int, rng: random.Random) -> Sequence[str]:
    if size > 1:
        return rng.sample((*USERS, NOBODY), size)
    strangers_too = errand not in (chat, chat_dropped)
    return rng.choices((*USERS, NOBODY), weights=(3, 3, 3, 1 if strangers_too else 0))


async def drive(host: str, port: int, errands: Iterable[Task], on_errand: Callable[[], None]) -> Tally:
    """Run the errands with ``AT_ONCE`` of them under way, calling ``on_errand`` after each."""
    tally = Tally()
    waiting = iter(errands)

    async def work(server: Server) -> None:
        for errand, askers in waiting:
            try:
                tally.outcomes += await errand(server, askers)
            except (httpx.HTTPError, OSError, EOFError, WebSocketException) as error:
                tally.outcomes += [Outcome(asker, f"{errand.__name__}: {error!r}", 0, frozenset()) for asker in askers]
            on_errand()

    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with (
        httpx.AsyncClient(base_url=f"http://{host}:{port}", limits=limits, timeout=30, trust_env=False) as client,
        asyncio.TaskGroup() as workers,
    ):
        for _ in range(AT_ONCE):
            workers.create_task(work(Server(client, host, port)))
    return tally
