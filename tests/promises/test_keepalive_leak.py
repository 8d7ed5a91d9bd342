"""Promise 1 on keep-alive connections: nothing that one request sets is seen by the next, whoever set it.

Without us it is. uvicorn starts a pipelined request from inside the task that finished the one before, so it inherits
that task's context. And asyncio's transports read on in the context of whoever resumed them (cpython#140947), which
uvicorn does from the request's task once reading was paused: by pipelining, or by a body that came faster than it was
read. From then on every request of that connection inherits it, and so does a WebSocket. uvloop's transports keep
their own context, so there the pipelined request alone leaks. hypercorn and granian start each request in a context
of the connection's or the server's, and do not leak.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.raw_http import RawConnection, RawResponse, build_request
from support.servers import Server

Seen = dict[str, Any]
"""What the app saw of a user, by the way it looked. The pool is the app's own, made at startup for everybody."""

NOTHING: Seen = {"contextvar": None, "structlog": None, "sentry": None, "state": None, "pool": "made at startup"}
ALICE: Seen = NOTHING | {"contextvar": "alice", "structlog": "alice", "sentry": "alice"}

FOUR_MEGABYTES = b"x" * 4_000_000


def served_alice(response: RawResponse) -> None:
    assert response.json() == ALICE | {"state": "alice"}


def one_after_the_other(connection: RawConnection) -> Seen:
    served_alice(connection.request("/as/alice"))
    seen: Seen = connection.request("/whoami").json()
    return seen


def pipelined(connection: RawConnection) -> Seen:
    first, second = connection.pipeline(build_request("/as/alice"), build_request("/whoami"))
    served_alice(first)
    seen: Seen = second.json()
    return seen


def after_pipelining(connection: RawConnection) -> Seen:
    pipelined(connection)
    seen: Seen = connection.request("/whoami").json()
    return seen


def after_a_big_body(connection: RawConnection) -> Seen:
    served_alice(connection.request("/as/alice", method="POST", body=FOUR_MEGABYTES))
    seen: Seen = connection.request("/whoami").json()
    return seen


def after_an_anonymous_big_body(connection: RawConnection) -> Seen:
    assert connection.request("/whoami", method="POST", body=FOUR_MEGABYTES).json() == NOTHING
    return one_after_the_other(connection)


def websocket_after_a_big_body(connection: RawConnection) -> Seen:
    served_alice(connection.request("/as/alice", method="POST", body=FOUR_MEGABYTES))
    with connect("ws://test/", sock=connection.socket) as websocket:
        seen: Seen = json.loads(websocket.recv())
    return seen


Situation = Callable[[RawConnection], Seen]
"""Serves alice on a connection, then an anonymous client on the same one; returns what the app saw of the latter."""

every_situation = pytest.mark.parametrize(
    "situation",
    [
        one_after_the_other,
        pipelined,
        after_pipelining,
        after_a_big_body,
        after_an_anonymous_big_body,
        websocket_after_a_big_body,
    ],
)


def asyncio_reads_on_in_the_context_of_the_resumer() -> bool:
    """Whether this Python has cpython#140947, which a release may repair one day."""
    resumed: ContextVar[bool] = ContextVar("resumed", default=False)

    async def observe() -> bool:
        loop = asyncio.get_running_loop()
        seen = loop.create_future()

        class Observer(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                seen.set_result(resumed.get())

        near, far = socket.socketpair()
        with far:
            transport, _ = await loop.create_connection(Observer, sock=near)
            transport.pause_reading()
            resumed.set(True)
            transport.resume_reading()
            far.send(b"x")
            answer: bool = await seen
            transport.close()
        return answer

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(observe())


def leaks(server_kind: str) -> dict[Situation, Seen]:
    """What leaks where without us, as documented above."""
    if server_kind not in {"uvicorn-h11", "uvicorn-httptools", "uvicorn-uvloop"}:
        return {}
    if server_kind == "uvicorn-uvloop" or not asyncio_reads_on_in_the_context_of_the_resumer():
        return {pipelined: ALICE}
    return {
        pipelined: ALICE,
        after_pipelining: ALICE,
        after_a_big_body: ALICE,
        # Sentry's middleware takes the inherited context for a request within a request and opens no scope of its
        # own: whoever sent the big body, all later requests of the connection share one.
        after_an_anonymous_big_body: NOTHING | {"sentry": "alice"},
        websocket_after_a_big_body: ALICE,
    }


@pytest.fixture(scope="module")
def bare(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "keepalive:bare")


@pytest.fixture(scope="module")
def firewalled(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "keepalive:firewalled")


@pytest.fixture(scope="module")
def managed(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "keepalive:managed")


@every_situation
def test_without_us_the_next_request_inherits_exactly_this(bare: Server, situation: Situation) -> None:
    with RawConnection(bare) as connection:
        assert situation(connection) == leaks(bare.kind).get(situation, NOTHING)


def test_without_us_a_state_shared_by_the_server_is_seen_by_the_next_request(server_factory: ServerFactory) -> None:
    with RawConnection(server_factory("uvicorn-h11", "keepalive:sharing")) as connection:
        assert one_after_the_other(connection) == NOTHING | {"state": "alice"}


@every_situation
def test_behind_the_firewall_it_inherits_nothing(firewalled: Server, situation: Situation) -> None:
    with RawConnection(firewalled) as connection:
        assert situation(connection) == NOTHING


@every_situation
def test_behind_the_middleware_alone_it_inherits_nothing(managed: Server, situation: Situation) -> None:
    with RawConnection(managed) as connection:
        assert situation(connection) == NOTHING


def bystander_saw(server: Server) -> list[str]:
    """Whom code outside of us saw as each request began, on two connections that alice was the first to use."""
    with RawConnection(server) as connection:
        answers = connection.pipeline(build_request("/as/alice"), build_request("/whoami"))
        answers.append(connection.request("/whoami"))
    with RawConnection(server) as connection:
        answers.append(connection.request("/as/alice", method="POST", body=FOUR_MEGABYTES))
        answers.append(connection.request("/whoami"))
    return [answer.headers["x-bystander-saw"] for answer in answers]


def test_without_us_code_outside_of_the_app_inherits_the_user(server_factory: ServerFactory) -> None:
    server = server_factory("uvicorn-h11", "keepalive:observed")
    assert bystander_saw(server)[1] == "alice"


def test_outside_of_the_firewall_nothing_is_inherited_either(firewalled: Server) -> None:
    assert bystander_saw(firewalled) == ["nobody"] * 5


def test_outside_of_the_middleware_nothing_is_inherited_either(managed: Server) -> None:
    assert bystander_saw(managed) == ["nobody"] * 5
