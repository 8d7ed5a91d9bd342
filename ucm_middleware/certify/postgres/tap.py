"""A server on the loopback interface that hands all on to PostgreSQL, and back."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from ucm_middleware.certify.postgres.connection import Connection
from ucm_middleware.certify.postgres.conversation import Use
from ucm_middleware.certify.postgres.dsn import HOST, Target, read_dsn


class Tap:
    """One that runs. ``dsn`` is what the application is to be given. ``connections`` counts those that were made,
    ``unwatched`` those of them that could not be followed: what they say passed all the same.
    """

    def __init__(self, target: Target, used: Callable[[Use], None]) -> None:
        self.dsn = ""
        self._target = target
        self._used = used
        self._all: list[Connection] = []

    @property
    def connections(self) -> int:
        return sum(each.has_begun for each in self._all)

    @property
    def unwatched(self) -> int:
        return sum(each.is_lost for each in self._all)

    def accept(self) -> asyncio.Protocol:
        """Somebody connects."""
        connection = Connection(self._target, self._used)
        self._all.append(connection)
        return connection.client

    async def aclose(self) -> None:
        """Hang up on everybody."""
        for each in self._all:
            each.abort()
        await asyncio.gather(*(each.over.wait() for each in self._all))


@asynccontextmanager
async def tap(dsn: str, used: Callable[[Use], None]) -> AsyncGenerator[Tap]:
    """Listen inside the block. ``used`` is called whenever a client begins to use a connection on which settings are in
    force that were there before; it is called before its statement goes on to the server.

    Raises ConfigurationError for a DSN that cannot be read, or asks for what the tap cannot do.
    """
    parsed = read_dsn(dsn)
    target = parsed.target()
    if target.wants_tls:
        target.tls()
    made = Tap(target, used)
    server = await asyncio.get_running_loop().create_server(made.accept, HOST, 0, backlog=512)
    made.dsn = parsed.leading_to(server.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        server.close()
        await made.aclose()
        await server.wait_closed()
