"""Streams of one connection, on real hypercorn: each answer is its own, and one that is late or endless ends alone."""

import asyncio
from collections.abc import Generator

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived

from support.certifying import ROOT
from ucm_middleware.certify.lines.answer import LARGEST
from ucm_middleware.certify.lines.http2 import MultiplexedLine
from ucm_middleware.certify.lines.request import Request
from ucm_middleware.testing.server import start_server

APP = "tests.certify.apps.echoes:app"


@pytest.fixture(scope="module")
def port() -> Generator[int]:
    with start_server(APP, app_dir=ROOT, kind="hypercorn") as server:
        yield server.port


async def test_each_has_its_own_answer_and_what_fails_fails_alone(port: int) -> None:
    line = await MultiplexedLine.open(port)
    late = line.send(Request("GET", "/never", ()))
    endless = line.send(Request("GET", "/endless", ()))
    posts = [line.send(Request("POST", "/echo", (("X-User", str(at)),), b"%d" % at * 4000)) for at in range(9)]
    answers = await asyncio.gather(*(line.answer(each, 20) for each in posts))
    assert [answer.ending for answer in answers] == ["complete"] * 9
    assert [answer.body for answer in answers] == [b"%d:" % at + b"%d" % at * 4000 for at in range(9)]
    assert (await line.answer(late, 0.05)).ending == "late"
    found = await line.answer(endless, 20)
    assert (found.ending, found.status, len(found.body) > LARGEST) == ("endless", 200, True)
    again = await line.answer(line.send(Request("POST", "/echo", (("X-User", "x"),), b"y")), 20)
    assert again.body == b"x:y"
    line.close()


async def test_more_than_the_window_takes_is_refused_and_the_rest_goes_on(port: int) -> None:
    line = await MultiplexedLine.open(port)
    body = b"x" * 16 * 1024
    sent = [line.send(Request("POST", "/echo", (("X-User", "a"),), body)) for _ in range(6)]
    endings = [(await line.answer(each, 20)).ending for each in sent]
    assert endings[:3] == ["complete"] * 3
    assert set(endings) == {"complete", "refused"}
    line.close()


async def test_nothing_is_sent_over_one_that_is_over(port: int) -> None:
    line = await MultiplexedLine.open(port)
    waiter = line.send(Request("GET", "/never", ()))
    line.drop()
    assert (await line.answer(waiter, 20)).ending == "dropped"
    assert line.is_over
    assert (await line.answer(line.send(Request("GET", "/never", ())), 20)).ending == "refused"


class Leaving(asyncio.Protocol):
    """A server that takes two requests, answers the first, and goes."""

    def __init__(self) -> None:
        self._connection = H2Connection(H2Configuration(client_side=False))
        self._taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connection.initiate_connection()

    def data_received(self, data: bytes) -> None:
        self._taken += sum(isinstance(event, RequestReceived) for event in self._connection.receive_data(data))
        if self._taken == 2:
            self._taken = 0
            self._connection.send_headers(1, [(":status", "200")])
            self._connection.send_data(1, b"the last one", end_stream=True)
            self._connection.close_connection(last_stream_id=1)
        self._transport.write(self._connection.data_to_send())


async def test_what_a_server_that_goes_does_not_answer_is_not_waited_for() -> None:
    server = await asyncio.get_running_loop().create_server(Leaving, "127.0.0.1", 0)
    async with server:
        line = await MultiplexedLine.open(server.sockets[0].getsockname()[1])
        first, second = (line.send(Request("GET", "/", ())) for _ in range(2))
        assert (await line.answer(second, 20)).ending == "dropped"
        answer = await line.answer(first, 20)
        assert (answer.ending, answer.body) == ("complete", b"the last one")
        assert line.is_over
        line.close()
