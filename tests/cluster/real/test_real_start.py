"""What a worker says to a store that it cannot work with: a clear error at its start, or the declared policy."""

import asyncio
import json
import re
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from support.fleet import APPS, LIMIT, PREFIX, QUIET, Worker, environment, start_worker
from support.hammer import check_served, hammer, most_at_once
from support.old_server import start_old_server
from support.processes import HOST
from support.restarts import Restarts, restartable_valkey, url_at
from support.valkey import ADMIN
from support.waiting import PATIENCE
from support.witness import Witness, wait_until_free, wall_minus_monotonic
from ucm_middleware import ConfigurationError
from ucm_middleware.testing.server import start_server
from ucm_valkey.cluster import open_store

LEASE = 1.0
HOW_TO = Path(__file__).parents[3] / "docs" / "how-to" / "run-many-workers.md"
ANOTHER_SECRET = "kT4nW8bQ2xZ6vM1cR9yL5sD3pG7hJ0fA"


def refusal(env: Mapping[str, str]) -> str:
    """What a worker says that does not start."""
    with (
        pytest.raises(AssertionError, match="ended while starting") as ended,
        start_server("cluster_app:app", app_dir=APPS, env=env, options=QUIET),
    ):
        pass
    return str(ended.value)


def refused(url: str, **policy: Any) -> str:
    said = refusal(environment(url, lease=LEASE, **policy))
    assert "cluster: " in said
    return said


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://127.0.0.1", "postgresql"),
        ("valkey://:hidden-word@127.0.0.1:notaport", "host or port"),
        ("valkey://:hidden-word@127.0.0.1/zero", "number of a database"),
        ("valkey://:hidden-word@127.0.0.1?clutser=true", "option"),
    ],
)
def test_a_url_that_is_wrong(url: str, expected: str) -> None:
    said = refused(url)
    assert expected in said
    assert "hidden-word" not in said


def test_a_password_that_is_wrong(store: Restarts) -> None:
    said = refused(f"valkey://:hidden-word@{HOST}:{store.port}")
    assert "password" in said
    assert "hidden-word" not in said


def test_no_password_where_one_is_wanted(store: Restarts) -> None:
    assert "password" in refused(f"valkey://{HOST}:{store.port}")


@pytest.mark.parametrize("command", ["eval", "evalsha"])
def test_a_user_who_may_run_no_scripts(store: Restarts, command: str) -> None:
    login = {"passwords": ["+of-the-app"], "categories": ["+@all"], "keys": ["*"], "channels": ["*"]}
    store.server.admin.acl_setuser("app", enabled=True, commands=[f"-{command}"], **login)
    said = refused(f"valkey://app:of-the-app@{HOST}:{store.port}")
    assert f"+{command};" in said
    assert "of-the-app" not in said


def documented_rights() -> list[str]:
    """Those that the how-to gives the store's user, for the application of these tests."""
    (line,) = [line for line in HOW_TO.read_text().splitlines() if line.startswith("ACL SETUSER shop ")]
    return line.replace("ucm:shop:", PREFIX).split()[5:]


async def test_a_user_with_the_documented_rights_and_not_one_less(store: Restarts) -> None:
    rights = documented_rights()
    admin = store.server.admin
    url = f"valkey://shop:of-the-shop@{HOST}:{store.port}"

    def allow(*some: str) -> None:
        admin.execute_command("ACL", "SETUSER", "shop", "reset", "on", ">of-the-shop", *some)

    allow(*rights)
    with start_worker(store.port, url=url, lease=LEASE) as worker, worker.connect("alice") as connection:
        worker.tell("send?user=alice&by=me&count=1")
        assert '"by":"me"' in str(connection.recv())
        assert worker.request("alice").status_code == 200
        worker.tell("revoke?user=alice")
        with pytest.raises(ConnectionClosed):
            connection.recv()
        assert worker.ask("cluster") == {}
    admin.flushall()  # the application's seal, too
    for right in (right for right in rights if right[0] in "+~&"):
        allow(*(other for other in rights if other != right))
        session = open_store(url, prefix=PREFIX, seals=("seal",), timeout=PATIENCE).session()
        try:
            with pytest.raises(ConfigurationError, match="(?i)" + re.escape(right.removeprefix("+"))):
                await session.inspect()
        finally:
            await session.aclose()


def test_a_server_that_may_evict_keys() -> None:
    with restartable_valkey("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as store:
        assert "maxmemory-policy" in refused(store.url)


@pytest.mark.parametrize("version", ["6.0.16", "6.2.14"])
def test_a_server_that_is_too_old(version: str) -> None:
    with start_old_server(version) as port:
        assert version in refused(f"valkey://{HOST}:{port}")


def test_another_applications_prefix(store: Restarts) -> None:
    """With another secret it is another application: it must not start, and the first one goes on."""
    with start_worker(store.port, lease=LEASE) as first:
        said = refusal({**environment(store.url, lease=LEASE), "UCM_SECRET": ANOTHER_SECRET})
        assert "name of its own" in said
        assert ANOTHER_SECRET not in said
        assert first.request("alice").status_code == 200
        with start_worker(store.port, lease=LEASE) as another:
            assert another.request("alice").status_code == 200


@pytest.mark.parametrize(("when", "status", "healthy"), [("closed", 503, False), ("local", 200, True)])
def test_a_store_that_is_not_there_yet(when: str, status: int, healthy: bool) -> None:
    """The declared policy holds until it is."""
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        url = url_at(holder.getsockname()[1])
        env = environment(url, lease=LEASE, timeout=0.2, when_unavailable=when)
        with start_server("cluster_app:app", app_dir=APPS, env=env, options=QUIET) as server:
            worker = Worker(server, None)
            try:
                answer = worker.request("alice")
                assert answer.status_code == status
                assert ("retry-after" in answer.headers) is (status == 503)
                state = worker.ask("state")
                assert (state["is_healthy"], state["state"]) == (healthy, "local" if healthy else "down")
                assert "the cluster's store cannot be asked (down: nothing listens at" in server.output
                assert ADMIN not in server.output
            finally:
                worker.close()


def test_clocks_that_are_an_hour_apart(store: Restarts, witness: Witness) -> None:
    offset = wall_minus_monotonic()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                start_worker(store.port, app="cluster_app_ahead:app", env={"CLOCK_AHEAD": str(ahead)}, lease=LEASE)
            )
            for ahead in (3600, 0, -3600)
        ]
        outcome = asyncio.run(hammer([worker.server.port for worker in workers], 30, 2 * LEASE))
        wait_until_free(store.server)
    history = witness.history()
    print(json.dumps(dict(outcome.counts)))
    assert max(history.most.values()) == LIMIT
    assert most_at_once(outcome.served) <= LIMIT
    assert len({answer.pid for answer in outcome.served}) == 3
    check_served(outcome.served, history, offset)
    assert not history.live
