"""Events of one user over several workers, through a store in memory."""

import pytest

from support.cluster import Site, quiet, seasoned, site
from support.events import Client, accept, open_connection
from support.memory_store import MemoryServer
from ucm_middleware import Delivery, UserExecutionContext

ALICE = "alice"


async def join(
    one: Site, user_id: str = ALICE, after: tuple[str | None, int | None] | None = None
) -> tuple[UserExecutionContext, Client]:
    """A connection with a lease, as the middleware makes it."""
    lease = await one.worker.acquire(user_id)
    context, client = open_connection(one.manager, user_id)
    lease.context = context
    accept(one.manager, context, client, after)
    return context, client


def places(client: Client) -> list[tuple[str, int]]:
    return [(envelope["epoch"], envelope["sequence"]) for envelope in client.envelopes]


@pytest.fixture
def server() -> MemoryServer:
    return seasoned()


async def test_an_event_reaches_the_connections_of_every_worker(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two, site(server) as three:
        _, first = await join(one)
        _, second = await join(two)
        _, stranger = await join(three, "bob")
        await quiet()
        said = await one.manager.send_event(ALICE, "message", {"n": 1})
        back = await two.manager.send_event(ALICE, "message", {"n": 2})
        await quiet()

        assert said == Delivery("epoch1", 1, 0, 2, (), True)
        assert (back.epoch, back.sequence) == ("epoch1", 2)
        assert first.data == second.data == [{"n": 1}, {"n": 2}]
        assert first.frames == second.frames
        assert stranger.frames == []
