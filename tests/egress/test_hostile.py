"""On real servers: apps and clients that try what the guard may stumble over, or tell by accident."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.servers import Server
from support.waiting import wait_until

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> Server:
    ledger = tmp_path_factory.mktemp("ledger") / "audit.db"
    return module_server_factory(server_kind, "hostile:app", env={"LEDGER": str(ledger)})


class Site:
    """One of the apps, and a value of alice's that it shows to everybody."""

    def __init__(self, server: Server, mode: str) -> None:
        self.client = httpx.Client(base_url=f"{server.url}/{mode}")
        self.ws_url = f"{server.ws_url}/{mode}"
        self.value = secrets.token_hex(24)
        self.before = len(self.seen())
        assert self.post("alice", "/protect", self.value).text == "ok"

    def get(self, user: str, path: str) -> httpx.Response:
        return self.client.get(path, headers={"x-user": user})

    def post(self, user: str, path: str, content: str) -> httpx.Response:
        return self.client.post(path, headers={"x-user": user}, content=content)

    def seen(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/seen").json()
        return found

    def new(self) -> list[dict[str, Any]]:
        """What came on record since this began."""
        wait_until(lambda: len(self.seen()) > self.before, "a record of the guard")
        return self.seen()[self.before :]

    def has_new(self) -> bool:
        return len(self.seen()) > self.before


@pytest.fixture
def open_site(server: Server) -> Iterator[Callable[[str], Site]]:
    with ExitStack() as opened:

        def open_site(mode: str) -> Site:
            site = Site(server, mode)
            opened.callback(site.client.close)
            return site

        yield open_site


class TestOracles:
    def test_what_a_user_stored_is_known_when_it_is_shown_later(self, blocking: Site) -> None:
        assert blocking.post("bob", "/store", blocking.value).text == "ok"
        answer = blocking.get("bob", "/shown")
        assert answer.status_code == 200
        assert blocking.value in answer.text

    def test_also_where_its_letters_are_escaped_over_many_parts(self, blocking: Site) -> None:
        filler = "x " * 32_750
        escaped = "".join(f"%{ord(letter):02x}" for letter in blocking.value)
        assert blocking.post("bob", "/store", f"{filler}{escaped} {filler}").text == "ok"
        assert blocking.get("bob", "/profile").status_code == 200

    def test_two_messages_are_not_one(self, blocking: Site) -> None:
        with connect(f"{blocking.ws_url}/socket", additional_headers={"x-user": "bob"}) as connection:
            for message in (blocking.value, "profile", "bye"):
                connection.send(message)
            assert connection.recv(30) == blocking.value

    def test_what_a_user_sent_before_it_had_a_name_is_known(self, blocking: Site) -> None:
        own = secrets.token_hex(24)
        answer = blocking.client.post("/login", content=f"bob {own}", headers={"x-said": blocking.value})
        assert answer.json() == {"session": own}
        assert blocking.get("bob", "/profile").status_code == 200


class TestFalseHits:
    def test_nobody_claims_what_everybody_is_shown(self, blocking: Site) -> None:
        public = secrets.token_hex(24)
        assert blocking.post("mallory", "/claim", public).json() == {"access_token": public}
        assert blocking.post("alice", "/store", public).text == "ok"
        assert public in blocking.get("bob", "/shown").text

    def test_who_logs_in_gets_the_session(self, either: Site) -> None:
        value = secrets.token_hex(24)
        answer = either.client.post("/login", content=f"carol {value}")
        assert answer.json() == {"session": value}
        assert not either.has_new()


class TestFound:
    def test_in_an_answer_that_is_compressed_outside(self, server: Server) -> None:
        site = Site(server, "gzip")
        answer = site.get("bob", "/profile")
        assert answer.headers["content-encoding"] == "gzip"
        assert site.value in answer.text
        assert site.new()[0]["field"] == "$.token"
        site.client.close()

    def test_letter_by_letter(self, either: Site) -> None:
        got = b""
        try:
            with either.client.stream("GET", "/parts", headers={"x-user": "bob"}) as answer:
                for part in answer.iter_raw():
                    got += part
        except httpx.HTTPError:
            assert either.value.encode()[:1] + b"\n" not in got
        assert (either.value.encode() in got) is either.ws_url.endswith("report")
        assert either.new()

    def test_in_a_long_answer(self, reporting: Site) -> None:
        assert reporting.get("bob", "/big").text.count(reporting.value) == 4
        assert reporting.new()

    def test_a_long_answer_breaks_off(self, blocking: Site) -> None:
        with pytest.raises(httpx.HTTPError):
            blocking.get("bob", "/big")
        assert blocking.new()

    def test_in_a_cookie_behind_an_escape(self, either: Site) -> None:
        answer = either.get("bob", "/raw/cookie")
        assert answer.status_code == (200 if either.ws_url.endswith("report") else 500)
        assert either.new()[0]["field"] == "set-cookie"

    def test_in_binary_and_in_the_reason_of_a_close(self, either: Site) -> None:
        is_blocked = either.ws_url.endswith("block")
        with connect(f"{either.ws_url}/socket", additional_headers={"x-user": "bob"}) as connection:
            connection.send("binary")
            connection.send("close")
            if not is_blocked:
                assert connection.recv(30) == either.value.encode()
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.reason == ("" if is_blocked else either.value)
        wait_until(lambda: len(either.seen()) - either.before >= 2, "two records")

    def test_in_the_answer_that_denies_a_connection(self, either: Site) -> None:
        with (
            pytest.raises(InvalidStatus) as denied,
            connect(f"{either.ws_url}/denied", additional_headers={"x-user": "bob"}),
        ):
            pass
        response = denied.value.response
        if response.body:  # not every server passes it on
            is_reported = either.ws_url.endswith("report")
            assert response.status_code == (403 if is_reported else 500)
            assert (either.value.encode() in response.body) is is_reported
            assert either.new()

    def test_under_a_strict_audit(self, server: Server) -> None:
        site = Site(server, "strict")
        answer = site.get("bob", "/profile")
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        with pytest.raises(httpx.HTTPError):
            site.get("bob", "/parts")
        assert site.get("alice", "/profile").status_code == 200
        assert {record["outcome"] for record in site.new()} == {"denied"}
        site.client.close()


class TestOddApps:
    def test_headers_that_can_be_read_once(self, either: Site) -> None:
        answer = either.get("bob", "/raw/iterated")
        assert (answer.headers["x-one"], answer.text) == ("1", "ok")

    def test_an_answer_that_never_ends(self, either: Site) -> None:
        got = b""
        with (
            pytest.raises(httpx.HTTPError),
            either.client.stream("GET", "/raw/unfinished", headers={"x-user": "bob"}) as answer,
        ):
            assert answer.status_code == 200
            for part in answer.iter_raw():
                got += part
        assert got == b"data: begin"
        assert not either.has_new()

    def test_no_answer(self, either: Site) -> None:
        assert either.get("bob", "/raw/silent").status_code == 500
