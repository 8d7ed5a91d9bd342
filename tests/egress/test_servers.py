"""On real servers: what is found in what is sent, what bob sees of it, and that echoed guesses are no hits."""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.servers import Server
from support.waiting import wait_until

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "guarded:app")


class Site:
    """One of the two apps, and what users do there."""

    def __init__(self, server: Server, mode: str) -> None:
        self.client = httpx.Client(base_url=f"{server.url}/{mode}")
        self.ws_url = f"{server.ws_url}/{mode}/socket"

    def get(self, user: str, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, headers={"x-user": user, **more.pop("headers", {})}, **more)

    def post(self, user: str, path: str, **more: Any) -> httpx.Response:
        return self.client.post(path, headers={"x-user": user, **more.pop("headers", {})}, **more)

    def secret_of(self, user: str) -> str:
        """A new value that this user protects, and that the cache has then."""
        value = secrets.token_hex(24)
        assert self.post(user, "/protect", content=value).text == "ok"
        self.cache(value)
        return value

    def cache(self, value: str) -> None:
        self.post("alice", "/put", json={"value": value})

    def seen(self, key: str = "system") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/seen").json()[key]
        return found

    def new(self, before: int) -> list[dict[str, Any]]:
        """What came on record since there were so many. Hits of one place are counted together after ten."""
        wait_until(lambda: len(self.seen()) > before, "a record of the guard")
        return self.seen()[before:]


@pytest.fixture
def open_site(server: Server) -> Iterator[Callable[[str], Site]]:
    with ExitStack() as opened:

        def open_site(mode: str) -> Site:
            site = Site(server, mode)
            opened.callback(site.client.close)
            return site

        yield open_site


VOLATILE = {"date"}


def as_bob_sees_it(response: httpx.Response, value: str) -> tuple[Any, ...]:
    headers = [(name, text.replace(value, "*")) for name, text in response.headers.items() if name not in VOLATILE]
    return response.status_code, headers, response.text.replace(value, "*")


@pytest.mark.parametrize("path", ["/profile", "/header", "/stream?at=7"])
class TestReporting:
    def test_a_leak_is_on_record_and_bob_sees_no_difference(self, reporting: Site, path: str) -> None:
        nobodys = secrets.token_hex(24)
        reporting.cache(nobodys)
        before = len(reporting.seen())
        free = as_bob_sees_it(reporting.get("bob", path), nobodys)
        assert len(reporting.seen()) == before
        value = reporting.secret_of("alice")
        assert as_bob_sees_it(reporting.get("bob", path), value) == free
        assert free[0] == 200
        [record] = reporting.new(before)
        fields = {"/profile": "$.items[0].token", "/header": "x-token", "/stream?at=7": "text"}
        assert record["outcome"] == "failed"
        assert (record["channel"], record["field"]) == ("response", fields[path])
        assert record["route"] == path.partition("?")[0]
        assert (record["receiver"], record["owners"]) == ("bob", ["alice"])
        assert value not in json.dumps(record)

    def test_bobs_trail_does_not_say_it_and_alices_not_who(self, reporting: Site, path: str) -> None:
        before = len(reporting.seen())
        reporting.secret_of("alice")
        reporting.get("bob", path)
        reporting.new(before)
        assert reporting.seen("bob") == []
        assert reporting.seen("alice")
        assert "bob" not in json.dumps(reporting.seen("alice"))

    def test_the_owner_gets_it(self, reporting: Site, path: str) -> None:
        reporting.secret_of("alice")
        before = len(reporting.seen())
        assert reporting.get("alice", path).status_code == 200
        assert len(reporting.seen()) == before


class TestEchoes:
    @pytest.mark.parametrize("mode", ["report", "block"])
    @pytest.mark.parametrize("by", ["path", "query", "header", "body", "escaped body", "percent"])
    def test_what_came_in_the_request_is_no_hit(self, server: Server, mode: str, by: str) -> None:
        site = Site(server, mode)
        value = site.secret_of("alice")
        before = len(site.seen())
        letters = "".join(f"\\u{ord(letter):04x}" for letter in value)
        escaped = '{"a": "' + letters + '"}'
        percent = "".join(f"%{ord(letter):02X}" for letter in value)
        answer = {
            "path": lambda: site.get("bob", f"/echo/{value}"),
            "query": lambda: site.get("bob", f"/echo?a={value}"),
            "header": lambda: site.get("bob", "/echo", headers={"x-said": value}),
            "body": lambda: site.post("bob", "/echo", json={"a": value}),
            "escaped body": lambda: site.post("bob", "/echo", content=escaped),
            "percent": lambda: site.get("bob", f"/echo?a={percent}"),
        }[by]()
        assert answer.status_code == 200
        assert value in answer.text
        assert len(site.seen()) == before
        site.client.close()

    def test_nor_what_the_user_sent_before(self, blocking: Site) -> None:
        value = blocking.secret_of("alice")
        assert blocking.get("bob", f"/echo?a={quote(value)}").status_code == 200
        answer = blocking.get("bob", "/profile")
        assert answer.status_code == 200
        assert value in answer.text
        assert blocking.get("carol", "/profile").status_code == 500


class TestBlocking:
    @pytest.mark.parametrize("path", ["/profile", "/header"])
    def test_the_answer_is_an_error_as_any_other(self, blocking: Site, path: str) -> None:
        before = len(blocking.seen())
        blocking.secret_of("alice")
        answer = blocking.get("bob", path)
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert "x-token" not in answer.headers
        assert blocking.new(before)[0]["outcome"] == "denied"
        assert blocking.get("alice", path).status_code == 200

    @pytest.mark.parametrize("at", [0, 1, 7, 47, 48])
    def test_a_stream_breaks_off_before_a_part_of_it_leaves(self, blocking: Site, at: int) -> None:
        value = blocking.secret_of("alice")
        got = b""
        with (
            pytest.raises(httpx.HTTPError),
            blocking.client.stream("GET", f"/stream?at={at}", headers={"x-user": "bob"}) as answer,
        ):
            for part in answer.iter_raw():
                got += part
        assert got.startswith(b"data: begin")
        assert value[:7].encode() not in got
        assert b"end" not in got

    def test_a_stream_without_it_is_whole(self, blocking: Site) -> None:
        blocking.cache("nothing-of-anybody")
        assert blocking.get("bob", "/stream?at=3").text == "data: begin\n\ndata: nothing-of-anybody\n\ndata: end\n\n"


def talk(site: Site, user: str, *messages: str) -> list[str]:
    """What a connection answers to each of these, and in the end to "bye"."""
    with connect(site.ws_url, additional_headers={"x-user": user}) as connection:
        for message in (*messages, "bye"):
            connection.send(message)
        answers: list[str] = []
        while (answer := str(connection.recv(30))) != "bye":
            answers.append(answer)
    return answers


class TestConnections:
    def test_messages_and_events_are_reported(self, reporting: Site) -> None:
        before = len(reporting.seen())
        value = reporting.secret_of("alice")
        answers = talk(reporting, "bob", "profile", "event")
        assert sum(value in answer for answer in answers) == 2
        wait_until(lambda: len(reporting.seen()) >= before + 2, "two records")
        assert {record["channel"] for record in reporting.seen()[before:]} == {"websocket", "event"}

    def test_messages_and_events_are_held_back(self, blocking: Site) -> None:
        value = blocking.secret_of("alice")
        answers = talk(blocking, "bob", "profile", "event")
        assert value not in "".join(answers)
        assert [json.loads(answer) for answer in answers] == [["guarded"]]

    def test_their_owner_gets_them(self, blocking: Site) -> None:
        value = blocking.secret_of("alice")
        assert sum(value in answer for answer in talk(blocking, "alice", "profile", "event")) == 2

    def test_what_the_client_sent_comes_back(self, blocking: Site) -> None:
        value = blocking.secret_of("alice")
        assert talk(blocking, "bob", value, "profile") == [value, f'{{"token":"{value}"}}']


class TestFields:
    def test_a_token_that_a_user_was_given_is_protected(self, reporting: Site) -> None:
        before = len(reporting.seen())
        value = secrets.token_hex(24)
        assert reporting.post("alice", "/login", json={"give": value[::-1]}).json() == {"access_token": value}
        reporting.cache(value)
        reporting.get("bob", "/profile")
        [record] = reporting.new(before)
        assert record["owners"] == ["alice"]

    def test_not_one_that_an_anonymous_user_was_given(self, reporting: Site) -> None:
        value = secrets.token_hex(24)
        reporting.client.post("/login", json={"give": value[::-1]})
        reporting.cache(value)
        before = len(reporting.seen())
        reporting.get("bob", "/profile")
        assert len(reporting.seen()) == before
