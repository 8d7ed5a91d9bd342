"""Workers of one application: each a uvicorn of its own, with a proxy of its own before the store."""

import json
import os
import signal
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from ucm_middleware.testing.server import start_server

from .observer import token_of
from .processes import HOST
from .restarts import url_at
from .servers import Server
from .tcp_proxy import TcpProxy, start_tcp_proxy
from .valkey import SECRET
from .waiting import PATIENCE, wait_until

APPS = Path(__file__).parent / "apps"
APPLICATION = "proof"
PREFIX = f"ucm:{APPLICATION}:"
LIMIT = 10

QUIET = ("--lifespan", "on", "--ws-ping-interval", "0", "--log-level", "warning")


def environment(url: str, *, lease: float, **policy: Any) -> dict[str, str]:
    """What a worker is started with."""
    fields = {"url": url, "application": APPLICATION, "lease": lease, "timeout": lease / 3, **policy}
    return {"CLUSTER": json.dumps(fields), "UCM_SECRET": SECRET}


def close_code(connection: ClientConnection) -> int:
    """Read a WebSocket to its end; the code that it was closed with."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            connection.recv()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


class Worker:
    """One that runs. ``proxy`` stands between it and the store."""

    def __init__(self, server: Server, proxy: TcpProxy | None) -> None:
        self.server = server
        self._proxy = proxy
        self._door = httpx.Client(base_url=server.url, timeout=PATIENCE, verify=False)

    @property
    def proxy(self) -> TcpProxy:
        assert self._proxy is not None, "it was started without one"
        return self._proxy

    def close(self) -> None:
        self._door.close()

    def ask(self, path: str) -> Any:
        """What the door says."""
        return self._answered(self._door.get(f"/door/{path}"))

    def tell(self, path: str) -> Any:
        """Have it do something."""
        return self._answered(self._door.post(f"/door/{path}"))

    def request(self, user: str, path: str = "/work?seconds=0") -> httpx.Response:
        """One request on a connection of its own."""
        with httpx.Client(base_url=self.server.url, timeout=PATIENCE, verify=False) as fresh:
            return fresh.get(path, headers=token_of(user))

    def connect(self, user: str, query: str = "") -> ClientConnection:
        """A WebSocket; use it in a `with` statement."""
        return connect(f"{self.server.ws_url}/talk{query}", additional_headers=token_of(user), open_timeout=PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.server.pid, number)

    def wait_for_state(self, state: str) -> None:
        wait_until(lambda: self.ask("state")["state"] == state, f"the worker is {state}")

    def wait_for_live(self, count: int) -> None:
        wait_until(lambda: self.ask("state")["live"] == count, f"the worker has {count} live contexts")

    def events(self, user: str, event: str) -> list[dict[str, Any]]:
        """The events of this kind in its trail of a user."""
        return [record for record in self.ask(f"trail/{user}")["events"] if record["event"] == event]

    @staticmethod
    def _answered(response: httpx.Response) -> Any:
        assert response.status_code == 200, response.text
        return response.json()


class Fleet:
    """Several, and requests to them that go on in the background."""

    def __init__(self, workers: Sequence[Worker], background: ThreadPoolExecutor) -> None:
        self.workers = workers
        self._background = background

    def begin(self, worker: Worker, user: str, path: str = "/hold") -> Future[httpx.Response]:
        return self._background.submit(worker.request, user, path)

    def hold(self, worker: Worker, user: str, count: int) -> list[Future[httpx.Response]]:
        """Have a user hold so many requests in a worker that has no others."""
        before = worker.ask("state")["live"]
        held = [self.begin(worker, user) for _ in range(count)]
        worker.wait_for_live(before + count)
        return held


@contextmanager
def start_worker(
    store_port: int,
    *,
    app: str = "cluster_app:app",
    proxied: bool = True,
    env: Mapping[str, str] | None = None,
    url: str | None = None,
    **policy: Any,
) -> Generator[Worker]:
    """One worker. With a ``url`` of its own it goes by that."""
    with ExitStack() as stack:
        proxy = stack.enter_context(start_tcp_proxy(HOST, store_port)) if proxied and url is None else None
        if url is None:
            url = url_at(store_port if proxy is None else proxy.port)
        server = stack.enter_context(
            start_server(
                app,
                app_dir=APPS,
                env={**environment(url, **policy), **(env or {})},
                options=QUIET,
            )
        )
        worker = Worker(server, proxy)
        stack.callback(worker.close)
        yield worker


@contextmanager
def start_fleet(store_port: int, count: int = 4, *, proxied: bool = True, **policy: Any) -> Generator[Fleet]:
    """So many workers, started side by side."""
    with ThreadPoolExecutor(48) as background, ExitStack() as stack:
        starting = [start_worker(store_port, proxied=proxied, **policy) for _ in range(count)]
        begun = [background.submit(stack.enter_context, worker) for worker in starting]
        fleet = Fleet([future.result() for future in begun], background)
        try:
            yield fleet
        finally:
            for worker in fleet.workers:
                if worker.server.returncode is None:
                    worker.tell("open")
