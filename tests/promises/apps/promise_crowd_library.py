"""The handler of `promise_crowd`, served by the websockets library: `python -m promise_crowd_library PORT`."""

import asyncio
import sys
from contextlib import suppress

from promise_crowd import answer, identify, manager
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from ucm_middleware.testing.server import HOST
from ucm_middleware.websocket.websockets import wrap_handler


async def listen(connection: ServerConnection) -> None:
    with suppress(ConnectionClosed):  # of those who drop their connection, the library logs a traceback otherwise
        async for message in connection:
            await connection.send(await answer(str(message)))


async def serve_crowd(port: int) -> None:
    handler = wrap_handler(listen, manager=manager, identify=identify)
    async with serve(
        handler, HOST, port, create_connection=handler.create_connection, reuse_address=True, reuse_port=True
    ) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_crowd(int(sys.argv[1])))
