"""Promise 7: limits count live contexts only, and at its deadline a context is gone, its resources closed."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.fixtures import ServerFactory
from support.observer import Observer, client, observing, token_of
from support.servers import Server
from support.waiting import wait_until

PER_USER, CONNECTIONS, TOTAL, ANONYMOUS = 10, 8, 14, 2
"""The first is the default, the others are what the app sets."""

TTL = 0.25


@pytest.fixture(scope="module")
def frozen(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_limits:app", env={"FROZEN": "1"})


@pytest.fixture(scope="module")
def timed(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_limits:app", env={"TTL": str(TTL)})


@pytest.fixture
def desk(frozen: Server) -> Iterator[Observer]:
    """The server whose clock stands still."""
    with observing(frozen) as observer:
        yield observer


@pytest.fixture
def clocked(timed: Server) -> Iterator[Observer]:
    """The server whose requests have a quarter of a second."""
    with observing(timed) as observer:
        yield observer


def hold(desk: Observer, user: str | None, count: int, path: str = "/hold") -> list[Future[httpx.Response]]:
    """Have a user hold so many requests."""
    held = [desk.begin(user, path) for _ in range(count)]
    wait_until(lambda: len(desk.journal("held", user=user or "nobody")) == count, f"{user} holds {count}")
    return held


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_a_user_may_have_ten_and_not_eleven(desk: Observer) -> None:
    held = hold(desk, "alice", PER_USER)
    assert_refused(desk.request("alice", "/quick"))
    assert desk.events("alice", "refused") != []
    # Which is nobody else's concern.
    assert desk.request("bob", "/quick").status_code == 200
    desk.open("let go")
    assert {answer.result().status_code for answer in held} == {200}
    desk.wait_until_idle()
    assert desk.request("alice", "/quick").status_code == 200


def test_the_application_may_have_so_many_and_not_one_more(desk: Observer) -> None:
    held = hold(desk, "alice", PER_USER) + hold(desk, "bob", TOTAL - PER_USER)
    assert_refused(desk.request("carol", "/quick"))
    assert desk.request(None, "/quick").status_code == 200
    desk.open("let go")
    assert {answer.result().status_code for answer in held} == {200}


def test_anonymous_visitors_have_a_limit_of_their_own(desk: Observer) -> None:
    held = hold(desk, None, ANONYMOUS)
    assert_refused(desk.request(None, "/quick"))
    assert desk.request("alice", "/quick").status_code == 200
    desk.open("let go")
    assert {answer.result().status_code for answer in held} == {200}


def test_websockets_count_and_are_refused_before_they_are_accepted(desk: Observer) -> None:
    """They have a limit of their own, below that of all, and so requests find room beside them."""
    with ExitStack() as connections:
        for _ in range(CONNECTIONS):
            assert connections.enter_context(desk.websocket("alice", "/hold")).recv() == "hello"
        connections.callback(desk.open, "let go")
        with pytest.raises(InvalidStatus) as refused, desk.websocket("alice", "/hold"):
            pass
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["retry-after"] == "1"
        held = hold(desk, "alice", PER_USER - CONNECTIONS)
        assert_refused(desk.request("alice", "/quick"))
    assert {answer.result().status_code for answer in held} == {200}


def test_children_do_not_count(desk: Observer) -> None:
    held = hold(desk, "alice", PER_USER, "/hold-with-children")
    assert_refused(desk.request("alice", "/quick"))
    desk.open("let go")
    assert {answer.result().status_code for answer in held} == {200}


def test_at_the_limit_ones_own_key_can_still_be_replaced(desk: Observer) -> None:
    assert desk.request("alice", f"/fill?name=old&count={PER_USER - 1}").status_code == 200
    assert desk.request("alice", "/replace").json() == ["done", "ContextLimitError"]
    wait_until(lambda: desk.journal("released", name="old-0") != [], "what was replaced is closed")
    assert desk.request("alice", f"/clear?name=old&count={PER_USER - 1}").status_code == 200


def test_what_has_expired_does_not_count_from_its_deadline_on(desk: Observer) -> None:
    assert desk.request("alice", f"/fill?name=brief&count={PER_USER - 1}&ttl=60").status_code == 200
    held = hold(desk, "alice", 1)
    assert_refused(desk.request("alice", "/quick"))
    desk.tell("advance?seconds=59.999")
    assert_refused(desk.request("alice", "/quick"))
    desk.tell("advance?seconds=0.001")
    assert desk.request("alice", "/quick").status_code == 200
    for number in range(PER_USER - 1):
        desk.wait_for("released", name=f"brief-{number}", error="ContextClosedError")
        assert desk.wait_until_closed("alice", f"brief-{number}")["reason"] == "expired"
    desk.open("let go")
    assert held[0].result().status_code == 200


def test_what_has_expired_cannot_be_had_from_its_deadline_on(desk: Observer) -> None:
    assert desk.request("alice", "/fill?name=short&count=1&ttl=60").status_code == 200
    desk.tell("advance?seconds=59.999")
    assert desk.request("alice", "/look?request_id=short-0").json() == "short-0"
    desk.tell("advance?seconds=0.001")
    assert desk.active() == []
    assert desk.request("alice", "/look?request_id=short-0").json() == "ContextExpiredError"
    desk.wait_for("released", name="short-0")
    assert desk.request("alice", "/look?request_id=short-0").json() == "ContextNotFoundError"


@pytest.mark.parametrize("name", ["zero", "negative", "nan", "infinite", "text", "boolean", "over-a-year"])
def test_a_life_of_no_sensible_length_is_refused(desk: Observer, name: str) -> None:
    assert desk.request("alice", f"/ttl/{name}").json() == "ttl_seconds"


def test_a_context_ends_with_the_credentials_of_its_user(desk: Observer) -> None:
    assert desk.request("alice", "/left").json() is None
    assert 0 < desk.request("alice-for-5", "/left").json() <= 5


def test_a_context_ends_before_the_credentials_of_its_user(clocked: Observer) -> None:
    assert 0 < clocked.request("alice-for-3600", "/left").json() <= TTL


def test_credentials_that_have_ended_are_refused(desk: Observer) -> None:
    refused = desk.request("alice-for--1", "/quick")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_request_whose_time_is_over_is_told_so(clocked: Observer) -> None:
    answer = clocked.request("alice", "/hold")
    assert answer.status_code == 504
    (interrupted,) = clocked.journal("interrupted", name="hold")
    assert interrupted["after"] >= TTL
    # The session sees that this is no ordinary end.
    assert clocked.wait_for("released", name="session")["error"] is not None
    clocked.wait_until_idle()
    assert clocked.events("alice", "closed")[-1]["reason"] == "expired"


def test_a_handler_whose_time_is_over_comes_to_its_end_before_its_resources_go_back(clocked: Observer) -> None:
    assert clocked.request("alice", "/unwind").status_code == 504
    released = [(entry["name"], entry["error"] is None) for entry in clocked.journal("released")]
    assert released == [("transaction", False), ("connection", False)]


def test_a_websocket_whose_time_is_over_is_told_so(clocked: Observer) -> None:
    with clocked.websocket("alice", "/hold") as websocket:
        assert websocket.recv() == "hello"
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert len(clocked.journal("interrupted", name="websocket")) == 1
    assert [entry["name"] for entry in clocked.journal("released")] == ["websocket"]


def test_a_websocket_whose_time_is_over_before_it_is_accepted_is_refused(clocked: Observer) -> None:
    with pytest.raises(InvalidStatus), clocked.websocket("alice", "/hold-before-accept"):
        pass
    assert len(clocked.journal("interrupted", name="before accept")) == 1


def test_a_response_whose_time_is_over_half_way_is_not_passed_off_as_whole(clocked: Observer) -> None:
    with (
        client(clocked.server) as fresh,
        fresh.stream("GET", "/stream", headers=token_of("alice")) as response,
    ):
        chunks = response.iter_text()
        assert next(chunks) == "first "
        with pytest.raises(httpx.RemoteProtocolError):
            next(chunks)
    clocked.wait_for("interrupted", name="stream")
    clocked.wait_for("released", name="stream")


def test_a_background_task_whose_time_is_over_is_ended(clocked: Observer) -> None:
    assert clocked.request("alice", "/background").json() == "done"
    clocked.wait_for("interrupted", name="background task")
    clocked.wait_for("released", name="background")


def test_a_thread_whose_time_is_over_can_use_its_context_no_more(clocked: Observer) -> None:
    answer = clocked.begin("alice", "/thread")
    clocked.wait_for("in thread")
    # Although the thread still runs.
    clocked.wait_until_idle()
    wait_until(lambda: clocked.events("alice", "closed")[-1]["reason"] == "expired", "the context has expired")
    clocked.open("time is over")
    clocked.wait_for("thread ended")
    assert clocked.journal("still usable") == []
    assert answer.result().status_code == 504


def test_one_users_slow_close_delays_nobody_elses_expiry(clocked: Observer) -> None:
    alice = clocked.begin("alice", "/slow-to-close")
    clocked.wait_for("closing")
    assert clocked.request("bob", "/hold").status_code == 504
    assert clocked.request("alice", "/quick").status_code == 200
    assert clocked.journal("closed") == []
    clocked.open("may close")
    assert alice.result().status_code == 504


@pytest.mark.parametrize("offset", [-86400, 86400])
def test_the_wall_clock_has_no_say(clocked: Observer, offset: int) -> None:
    answer = clocked.begin("alice", "/hold")
    clocked.wait_for("held", user="alice")
    try:
        clocked.tell(f"wall-clock?offset={offset}")
        assert answer.result().status_code == 504
        (interrupted,) = clocked.journal("interrupted", name="hold")
        assert interrupted["after"] >= TTL
    finally:
        clocked.tell("wall-clock?offset=0")
