"""The planted bugs of examples/gallery on a real server, each in a process of its own: they keep what they leak."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.gallery import GALLERY, Bug
from examples.gallery.drive import Drive, Received
from ucm_middleware.testing.server import Server, start_server

from .waiting import PATIENCE, wait_until

APPS = Path(__file__).parent / "apps"

every_bug = pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in GALLERY if bug.needs is None])
"""Those that need no service."""


@contextmanager
def serve_bug(
    bug: Bug, *, planted: bool, managed: bool, env: Mapping[str, str | None] | None = None
) -> Generator[Server]:
    """Serve the planted app or its clean twin, ``managed`` in the middleware; see `apps/gallery_app.py`."""
    chosen = {
        "GALLERY_BUG": bug.name,
        "GALLERY_PLANTED": "yes" if planted else None,
        "GALLERY_MANAGED": "yes" if managed else None,
    }
    options = ("--factory", "--loop", "asyncio")  # where all bugs show: uvloop spares `request_variable` the upload
    with start_server("gallery_app:make", app_dir=APPS, env={**chosen, **(env or {})}, options=options) as server:
        yield server


def drive(bug: Bug, *, planted: bool, managed: bool, env: Mapping[str, str | None] | None = None) -> list[Received]:
    """What the users were sent by such a server in the course of the bug's drive."""
    with serve_bug(bug, planted=planted, managed=managed, env=env) as server, Drive(server.url) as users:
        return users.run(bug.drive)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found of two drives, one after the other.

    `findings` are the checker's after the first, as text, with the contexts of all its requests still open. In the
    second each context closes with its request. `events` is what is on record of both once all contexts have closed.
    """

    received: list[Received]
    findings: list[str]
    events: list[dict[str, Any]]


def inspect(bug: Bug, *, planted: bool, env: Mapping[str, str | None] | None = None) -> Inspection:
    """Take a bug's drive in the middleware twice, and have the manager say what it sees."""
    inspected = {"GALLERY_INSPECTED": "yes", **(env or {})}
    with serve_bug(bug, planted=planted, managed=True, env=inspected) as server:
        with Drive(server.url) as users:
            received = users.run(bug.drive)
            findings = _get(server, "/_inspect")
        with Drive(server.url) as users:
            received += users.run(bug.drive)
        return Inspection(received, findings, _closed(server))


def _closed(server: Server) -> list[dict[str, Any]]:
    """The trail of a server whose contexts have all closed."""
    events: list[dict[str, Any]] = []

    def all_closed() -> bool:
        events[:] = _get(server, "/_trail")
        kinds = [event["event"] for event in events]
        return kinds.count("opened") == kinds.count("closed")

    wait_until(all_closed, "all contexts are closed")
    return events


def _get(server: Server, path: str) -> Any:
    answer = httpx.get(f"{server.url}{path}", timeout=PATIENCE, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def leaked(received: list[Received]) -> set[tuple[str, str]]:
    """Who was sent whose key, other than their own: (receiver, victim)."""
    return {(each.user, victim) for each in received for victim in each.keys_of - {each.user}}


def assert_kept_apart(received: list[Received]) -> None:
    """Each was sent their own key, so that there was something to mix up, and nobody another's."""
    assert {user for each in received for user in each.keys_of & {each.user}} == {"alice", "bob"}
    assert leaked(received) == set()
