"""uvicorn in a thread of the test's process: for what cannot be shared between processes, such as a store in memory."""

import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from support.waiting import wait_until


@contextmanager
def served(app: Any, **settings: Any) -> Generator[int]:
    """Serve an application, with its lifespan. Yields the port."""
    config = uvicorn.Config(
        app, port=0, log_config=None, lifespan="on", loop="asyncio", timeout_graceful_shutdown=2, **settings
    )
    server = uvicorn.Server(config)

    def run() -> None:
        with suppress(SystemExit):  # its way to say that it did not start
            server.run()

    thread = threading.Thread(target=run, name="uvicorn of a test", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server listens")
        if not server.started:
            raise RuntimeError("the server did not start")
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
