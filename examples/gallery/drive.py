"""Do what a drive of the gallery says, against a server that runs, and say who was sent whose key.

    python -m examples.gallery.drive global_cache http://127.0.0.1:8000

The exit status is 1 when somebody was sent another's key.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

import httpx

from examples.gallery import GALLERY
from examples.gallery.bug import Ask, Connect, Say, Step
from examples.gallery.common import USERS, api_key_of

if TYPE_CHECKING:
    from types import TracebackType

    from websockets.sync.client import ClientConnection

PATIENCE = 20.0
"""Seconds that an answer, a message, or what a patient request waits for may take."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a user was sent, headers included, in answer to ``step``."""

    user: str
    step: Step
    text: str

    @property
    def keys_of(self) -> set[str]:
        """The users whose keys are in it."""
        return {user for user in USERS if api_key_of(user) in self.text}


class Drive:
    """The users, as clients of the server at ``url`` ("http://..."). A context manager: it hangs up in the end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open = ExitStack()
        self._lines: dict[str, httpx.Client] = {}
        self._sockets: dict[str, ClientConnection] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._open.close()

    def run(self, steps: tuple[Step, ...]) -> list[Received]:
        """Take the steps one after another, and return all that users were sent, in order.

        Raises httpx.HTTPStatusError when a request is refused, TimeoutError when what a step waits for does not come.
        """
        return [received for step in steps for received in self._take(step)]

    def _take(self, step: Step) -> list[Received]:
        match step:
            case Ask():
                return [self._ask(step)]
            case Connect():
                return [self._connect(step)]
            case Say():
                return self._say(step)

    def _ask(self, step: Ask) -> Received:
        client = self._line(step.line or step.user)
        body = {**(step.body or {}), "padding": "x" * step.padding} if step.padding else step.body
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = client.request(step.method, step.path, headers=_authorization(step.user), json=body)
            if not (step.patient and answer.status_code == HTTPStatus.NOT_FOUND):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{step.path} was answered with 404 for {PATIENCE:g} s")
            time.sleep(0.01)
        answer.raise_for_status()
        headers = [f"{name}: {value}" for name, value in answer.headers.multi_items()]
        return Received(step.user, step, "\n".join([*headers, "", answer.text]))

    def _line(self, name: str) -> httpx.Client:
        if name not in self._lines:
            # One connection, which is used again and again.
            limits = httpx.Limits(max_connections=1)
            client = httpx.Client(base_url=self._url, limits=limits, timeout=PATIENCE, trust_env=False)
            self._lines[name] = self._open.enter_context(client)
        return self._lines[name]

    def _connect(self, step: Connect) -> Received:
        from websockets.sync.client import connect  # here: most drives need none, nor the library

        url = f"{self._url.replace('http', 'ws', 1)}{step.path}"
        socket = connect(url, additional_headers=_authorization(step.user), open_timeout=PATIENCE)
        self._sockets[step.user] = self._open.enter_context(socket)
        return Received(step.user, step, str(socket.recv(PATIENCE)))

    def _say(self, step: Say) -> list[Received]:
        socket = self._sockets[step.user]
        socket.send(step.text)
        received: list[Received] = []
        while not received or step.text not in received[-1].text:
            received.append(Received(step.user, step, str(socket.recv(PATIENCE))))
        return received


def _authorization(user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-of-{user}"}


def main(name: str, url: str) -> int:
    """Take the steps of a bug's drive, and print what came of each. Returns the exit status."""
    bug = next((bug for bug in GALLERY if bug.name == name), None)
    if bug is None:
        print(f"no bug is called {name!r}; there are {', '.join(bug.name for bug in GALLERY)}", file=sys.stderr)
        return 2
    with Drive(url) as users:
        received = users.run(bug.drive)
    for each in received:
        print(f"{each.user} was sent the keys of {', '.join(sorted(each.keys_of)) or 'nobody'} by {each.step}")
    return int(any(each.keys_of - {each.user} for each in received))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m examples.gallery.drive BUG URL")
    sys.exit(main(*sys.argv[1:]))
