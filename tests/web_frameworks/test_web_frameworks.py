"""The middleware around apps of frameworks that it knows nothing of, each on a real server."""

import json
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.servers import Server
from support.waiting import PATIENCE, wait_until

FRAMEWORKS = ["blacksheep", "falcon", "litestar", "quart", "sanic"]


@pytest.fixture(params=FRAMEWORKS, scope="module")
def server(request: pytest.FixtureRequest, module_server_factory: ServerFactory) -> Iterator[Server]:
    """One of each framework, where at the end nothing must be left that holds a context."""
    server = module_server_factory("uvicorn-uvloop", f"on_{request.param}:app")
    yield server
    assert "still held by" not in server.output


def get(client: httpx.Client, path: str, user: str | None) -> httpx.Response:
    return client.get(path, headers={} if user is None else {"user": user})


def ended(client: httpx.Client, of: str) -> list[str]:
    answer: list[str] = get(client, f"/ended?of={of}", "asking").json()
    return answer


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """One connection, which is kept for the next request."""
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server.url, timeout=PATIENCE, limits=limits, verify=False) as client:
        yield client


def test_each_request_is_its_users_and_sees_nothing_of_the_one_before(client: httpx.Client) -> None:
    for user in ("alice", "bob", "alice"):
        expected = {"handler": user, "thread": user, "task": user, "left": None}
        assert get(client, "/whoami", user).json() == expected
        assert get(client, "/sync", user).json() == {"handler": user}


@pytest.mark.parametrize("server", ["falcon"], indirect=True)
def test_a_thread_without_the_requests_variables_is_nobodys(client: httpx.Client) -> None:
    assert get(client, "/executor", "alice").status_code == 500


def test_the_identity_may_be_found_out_in_the_handler(client: httpx.Client) -> None:
    assert get(client, "/late?user=carol", None).json() == {"handler": "carol"}
    conflict = get(client, "/late?user=carol", "dave")
    assert (conflict.status_code, conflict.json()) == (409, {"detail": "The request already has another identity."})


def test_refusals_are_answered(client: httpx.Client) -> None:
    """What the framework does not catch is answered by the middleware, the rest by the handler that the page shows."""
    assert get(client, "/whoami", "x" * 1000).status_code == 400
    denied = get(client, "/denied", "alice")
    assert (denied.status_code, denied.json()) == (403, {"detail": "Not allowed."})


def test_a_handler_that_is_cut_off_has_ended_before_anything_is_released(client: httpx.Client) -> None:
    assert get(client, "/wait", "erin").status_code == 504
    assert ended(client, "erin") == ["ended", "released"]


def test_so_has_a_stream(client: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        get(client, "/ticks", "frank")
    wait_until(
        lambda: ended(client, "frank") == ["ended", "released"], "the stream has ended, and then all is released"
    )


def test_a_connection_is_its_users_and_is_cut_off(server: Server) -> None:
    with connect(f"{server.ws_url}/talk", additional_headers={"user": "alice"}, open_timeout=PATIENCE) as websocket:
        websocket.send("hello")
        assert json.loads(websocket.recv(PATIENCE)) == {"handler": "alice", "said": "hello"}
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(PATIENCE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
