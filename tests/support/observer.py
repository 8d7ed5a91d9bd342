"""The test's eyes and hands in a running server, for apps that have a `Door` (see tests/promises/apps)."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from .servers import Server
from .waiting import PATIENCE, wait_until

Entry = dict[str, Any]
"""One line of the journal: `what` happened, and details."""


def token_of(user: str | None) -> dict[str, str]:
    """The headers by which the apps know a user; none for nobody."""
    return {} if user is None else {"Authorization": f"Bearer token-of-{user}"}


def client(server: Server) -> httpx.Client:
    """A client with connections of its own."""
    # Not verifying spares it reading the certificates of the world, which takes longer than a test's requests.
    return httpx.Client(base_url=server.url, timeout=PATIENCE, verify=False)


class Observer:
    """Asks the server what happened in it, opens its gates, and sends requests that go on in the background."""

    def __init__(self, server: Server, door: httpx.Client, background: ThreadPoolExecutor) -> None:
        self.server = server
        self._door = door
        self._background = background

    def journal(self, what: str | None = None, **details: Any) -> list[Entry]:
        """The entries so far, in order, that say this."""
        entries: list[Entry] = self._ask("journal")
        wanted = details | ({} if what is None else {"what": what})
        return [entry for entry in entries if wanted.items() <= entry.items()]

    def wait_for(self, what: str, **details: Any) -> Entry:
        """Wait until such an entry is there, and return the first."""
        wait_until(lambda: bool(self.journal(what, **details)), f"the journal has {what!r} with {details}")
        return self.journal(what, **details)[0]

    def active(self) -> list[dict[str, Any]]:
        """The live contexts."""
        active: list[dict[str, Any]] = self._ask("active")
        return active

    def wait_until_idle(self) -> None:
        wait_until(lambda: not self.active(), "no context is live any more")

    def trail(self, user: str) -> dict[str, Any]:
        """The audit trail of a user, who must be known."""
        trail = self._ask(f"trail/{user}")
        assert isinstance(trail, dict)
        return trail

    def events(self, user: str, event: str) -> list[dict[str, Any]]:
        """The events of this kind in a user's audit trail."""
        return [record for record in self.trail(user)["events"] if record["event"] == event]

    def system_events(self, event: str) -> list[dict[str, Any]]:
        """The events of this kind that stand in no user's trail."""
        return [record for record in self._ask("system-trail") if record["event"] == event]

    def wait_until_closed(self, user: str, request_id: str) -> dict[str, Any]:
        """Wait until the teardown of this context is through, and return its event in the trail."""

        def closed() -> list[dict[str, Any]]:
            return [event for event in self.events(user, "closed") if event["request_id"] == request_id]

        wait_until(lambda: bool(closed()), f"context {request_id} of {user} is closed")
        return closed()[0]

    def open(self, gate: str) -> None:
        """Let those go on who wait at the gate, and who come later."""
        self.tell(f"open/{gate}")

    def ask(self, path: str) -> Any:
        """What the app's own route behind the door says."""
        return self._ask(path)

    def tell(self, path: str) -> Any:
        """Have the app's own route behind the door do something."""
        response = self._door.post(f"/door/{path}")
        assert response.status_code == 200, response.text
        return response.json()

    def request(self, user: str | None, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        """One request on a connection of its own, as a user or as nobody."""
        headers = {**token_of(user), **options.pop("headers", {})}
        with client(self.server) as fresh:
            return fresh.request(method, path, headers=headers, **options)

    def begin(self, user: str | None, path: str, method: str = "GET", **options: Any) -> Future[httpx.Response]:
        """The same, without waiting for the response."""
        return self._background.submit(self.request, user, path, method, **options)

    def websocket(self, user: str | None, path: str) -> ClientConnection:
        """A WebSocket connection; to be used in a `with` statement."""
        return connect(self.server.ws_url + path, additional_headers=token_of(user), open_timeout=PATIENCE)

    def _ask(self, path: str) -> Any:
        response = self._door.get(f"/door/{path}")
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def observing(server: Server) -> Iterator[Observer]:
    """A fresh journal for one test. At its end every gate is opened, and every context must then end."""
    with client(server) as door, ThreadPoolExecutor(32) as background:
        observer = Observer(server, door, background)
        observer.tell("reset")
        try:
            yield observer
        finally:
            if server.returncode is None:
                observer.tell("open")
        if server.returncode is None:
            observer.wait_until_idle()
