"""Promise 10: what was acknowledged is in the ledger, whatever happens to the server, and the ledger goes on."""

import os
import random
import secrets
import threading
from collections import Counter
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from support.ledger_check import LedgerCheck, Record, each_once
from support.observer import token_of
from support.raw_http import RawConnection
from support.servers import Server, start_server
from support.waiting import wait_until

APPS = Path(__file__).parent / "apps"
APP = "promise_trail:app"

CLIENTS = 16

KILLS = int(os.environ.get("UCM_TEST_KILLS", "1"))
"""How often each server is killed. `tox run -e crash` sets more."""


@dataclass
class Trail:
    """The files of a ledger, and how an app gets at them."""

    folder: Path
    is_sealed: bool
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def env(self) -> dict[str, str | None]:
        keys = str(self.folder / "keys.db") if self.is_sealed else None
        return {"LEDGER": str(self.folder / "audit.db"), "KEYS": keys, "UCM_SECRET": self.secret}

    def check(self) -> LedgerCheck:
        return LedgerCheck(self.folder / "audit.db", self.folder / "keys.db" if self.is_sealed else None, self.secret)


@pytest.fixture
def sealed(tmp_path: Path) -> Trail:
    return Trail(tmp_path, is_sealed=True)


class Load:
    """Clients that ask as fast as they can, each on one connection, until the server is gone.

    What has arrived to its last byte is noted: request ids, and how often a user was told that a handler failed.
    """

    def __init__(self, server: Server) -> None:
        self.acknowledged: list[str] = []
        self.failed: Counter[str] = Counter()
        self.other: list[int] = []
        self._threads = [threading.Thread(target=self._ask, args=(server, number)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _ask(self, server: Server, number: int) -> None:
        user = f"user-{number % 5}" if number % 4 else f"failing-{number}"
        with suppress(ConnectionRefusedError):  # by then it is gone
            while True:
                with suppress(EOFError, ConnectionResetError, BrokenPipeError), RawConnection(server) as connection:
                    self._converse(connection, user)

    def _converse(self, connection: RawConnection, user: str) -> None:
        for turn in count():
            path = "/fail" if user.startswith("failing") and turn % 2 else ("/work", "/stream")[turn % 3 == 0]
            answer = connection.request(path, headers=token_of(user))
            if answer.status == 200:
                self.acknowledged.append(answer.body.decode().strip('"'))
            elif (answer.status, path) == (500, "/fail"):
                self.failed[user] += 1
            else:
                self.other.append(answer.status)


def kill_under_load(server: Server, moment: random.Random) -> Load:
    load = Load(server)
    enough = moment.randrange(1, 400)
    wait_until(lambda: len(load.acknowledged) >= enough, f"{enough} requests are acknowledged")
    server.kill()
    load.join()
    assert load.other == []
    return load


def of_requests(records: list[Record], event: str) -> set[str]:
    return {record["request"] for record in records if record["event"] == event}


def assert_all_there(load: Load, records: list[Record]) -> None:
    acknowledged = set(load.acknowledged)
    assert acknowledged - of_requests(records, "opened") == set()
    assert acknowledged - of_requests(records, "answered") == set()
    ended = Counter(
        record["user"] for record in records if record["event"] == "closed" and record["outcome"] == "failed"
    )
    assert {user: (told, ended[user]) for user, told in load.failed.items() if told > ended[user]} == {}


class Crashes:
    """A server on one ledger, started and killed under load again and again."""

    def __init__(self, trail: Trail, kind: str, *options: str) -> None:
        self.trail = trail
        self.check = trail.check()
        self._kind, self._options = kind, options
        self._moment = random.Random()
        self.acknowledged = 0

    def start(self) -> AbstractContextManager[Server]:
        return start_server(self._kind, APP, app_dir=APPS, env=self.trail.env, options=self._options)

    def kill_once(self) -> None:
        with self.start() as server:
            load = kill_under_load(server, self._moment)
        assert_all_there(load, self.check.read())
        self.acknowledged += len(load.acknowledged) + load.failed.total()

    def go_on(self) -> None:
        """The next start goes on with the chain, and all that was before is as it was."""
        size = self.check.size
        with self.start() as server, RawConnection(server) as connection:
            mine = connection.request("/work", headers=token_of("alice")).json()
            assert mine in of_requests(self.check.read(), "answered")
        whole = self.trail.check()
        records = whole.read()
        assert whole.size > size
        each_once(records)


@pytest.mark.timeout(60 + 10 * KILLS)
def test_whatever_a_killed_server_had_acknowledged_is_in_the_ledger(sealed: Trail, server_kind: str) -> None:
    crashes = Crashes(sealed, server_kind)
    for _ in range(KILLS):
        crashes.kill_once()
    crashes.go_on()
    print(f"{server_kind}: {KILLS} kills, {crashes.acknowledged} acknowledged, none missing")


@pytest.mark.timeout(60 + 20 * KILLS)
def test_whatever_killed_workers_had_acknowledged_is_in_the_one_ledger(sealed: Trail) -> None:
    crashes = Crashes(sealed, "uvicorn-httptools", "--workers", "4")
    for _ in range(KILLS):
        crashes.kill_once()
    crashes.go_on()
    print(f"four workers: {KILLS} kills, {crashes.acknowledged} acknowledged, none missing")


def test_a_server_that_is_stopped_has_written_everything(sealed: Trail, server_kind: str) -> None:
    """Also what the app's own shutdown does, after the last request, right before the server ends itself."""
    with (
        start_server(server_kind, APP, app_dir=APPS, env={**sealed.env, "AUDIT": "async"}) as server,
        RawConnection(server) as connection,
    ):
        mine = [connection.request("/work", headers=token_of("alice")).json() for _ in range(50)]
        connection.close()
        server.stop()
    records = sealed.check().read()
    each_once(records)
    assert of_requests(records, "opened") == of_requests(records, "closed") == set(mine)
    reasons = {record["reason"] for record in records if record["event"] == "privileged"}
    assert {f"shutdown {number}" for number in range(500)} <= reasons
