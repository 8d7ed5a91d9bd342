"""``cancel_on_disconnect``: whose client has left is cut off, and whose client has the whole response is not."""

from collections.abc import Callable, Iterator

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of
from support.raw_http import RawConnection, build_request
from support.servers import Server

ALICE = token_of("alice")


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_disconnect:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.mark.parametrize(
    "request_of_alice",
    [
        build_request("/wait", headers=ALICE),
        build_request("/stream", headers=ALICE),
        build_request("/upload", method="POST", headers={**ALICE, "Content-Length": "20"}) + b"x" * 10,
    ],
    ids=["nothing sent", "half a response sent", "half a body received"],
)
@pytest.mark.parametrize("leave", [RawConnection.close, RawConnection.reset], ids=["closed", "reset"])
def test_whose_client_leaves_is_cut_off(
    desk: Observer, request_of_alice: bytes, leave: Callable[[RawConnection], None]
) -> None:
    with RawConnection(desk.server) as connection:
        connection.send(request_of_alice)
        desk.wait_for("waiting")
        leave(connection)
        desk.wait_for("cut off")
    desk.wait_until_idle()
    assert [event["reason"] for event in desk.events("alice", "closed")][-1] == "disconnected"


@pytest.mark.parametrize("kind", ["text", "stream", "file"])
@pytest.mark.parametrize("leave", [RawConnection.close, RawConnection.reset], ids=["closed", "reset"])
def test_whose_client_has_it_all_works_on_in_the_background(
    desk: Observer, kind: str, leave: Callable[[RawConnection], None]
) -> None:
    with RawConnection(desk.server) as connection:
        response = connection.request(f"/answer/{kind}", headers=ALICE)
        assert response.status == 200
        assert response.body != b""
        desk.wait_for("working on")
        leave(connection)
        # On a later connection, so that the server has seen the other one end before.
        assert desk.request("bob", "/answer/none", headers={"Connection": "close"}).status_code == 200
        desk.open("work")
        desk.wait_for("worked", user="alice")
    desk.wait_until_idle()
    assert [event["reason"] for event in desk.events("alice", "closed")][-1] == "finished"
