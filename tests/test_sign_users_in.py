"""The guide to signing in is what it says: its program runs as it stands there, and takes in nobody else."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from support.waiting import PATIENCE
from ucm_middleware.testing.server import Server, start_server

GUIDE = (Path(__file__).parents[1] / "docs" / "how-to" / "sign-users-in.md").read_text()
KEY = "nTq7Hc2vYx0LwZr9KdBf4sMj8GpEa6Ui"
ALICE = {"user": "alice", "password": "red bicycle"}
BOB = {"user": "bob", "password": "green ladder"}

# What the guide says of endpoints that its program does otherwise.
IN_A_THREAD = """
@app.post("/logout-in-a-thread")
def logout_in_a_thread(request: Request, context: AuthenticatedContext) -> dict[str, int]:
    request.session.clear()
    return {"closed": manager.revoke(context.user_id, "signed out")}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The program of the guide."""
    folder = tmp_path_factory.mktemp("guide")
    [program] = re.findall(r'```python title="accounts.py"\n(.*?)```', GUIDE, re.DOTALL)
    (folder / "accounts.py").write_text(program + IN_A_THREAD)
    keys = {"TOKEN_KEY": KEY, "COOKIE_KEY": "another one, for cookies alone", "UCM_ENVIRONMENT": None}
    with start_server("accounts:app", app_dir=folder, env=keys) as server:
        yield server


@pytest.fixture
def browser(server: Server) -> Iterator[httpx.Client]:
    """Somebody who keeps cookies."""
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def cookie(value: str) -> dict[str, str]:
    return {"Cookie": f"session={value}"}


def echo(server: Server, headers: dict[str, str]) -> ClientConnection:
    return connect(f"{server.ws_url}/echo", additional_headers=headers)


def say(connection: ClientConnection, text: str) -> str:
    connection.send(text)
    return str(connection.recv(PATIENCE))


def close_code(connection: ClientConnection) -> int:
    """The code with which the server closes it next."""
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(PATIENCE)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def token_of(browser: httpx.Client, who: dict[str, str]) -> str:
    answer = browser.post("/token", json=who)
    assert answer.status_code == 200
    return str(answer.json()["access_token"])


def who_am_i(browser: httpx.Client, headers: dict[str, str] | None = None) -> tuple[int, object]:
    answer = browser.get("/whoami", headers=headers)
    return answer.status_code, answer.json().get("user")


def test_a_session_from_signing_in_to_signing_out(server: Server, browser: httpx.Client) -> None:
    assert who_am_i(browser) == (401, None)
    assert browser.post("/login", json={**ALICE, "password": "blue"}).status_code == 401
    assert who_am_i(browser) == (401, None)
    assert browser.post("/login", json=ALICE).json() == {"user": "alice"}
    assert who_am_i(browser) == (200, "alice")

    with echo(server, cookie(browser.cookies["session"])) as connection:
        assert say(connection, "hello") == "alice: hello"
        # This request and the connection.
        assert browser.post("/logout").json() == {"closed": 2}
        assert close_code(connection) == 1008
    assert who_am_i(browser) == (401, None)


def test_a_refused_sign_in_changes_nothing(browser: httpx.Client) -> None:
    browser.post("/login", json=ALICE)
    assert browser.post("/login", json=BOB).status_code == 409
    assert who_am_i(browser) == (200, "alice")


def test_signing_out_in_a_thread_is_answered_too(browser: httpx.Client) -> None:
    browser.post("/login", json=ALICE)
    assert browser.post("/logout-in-a-thread").json() == {"closed": 1}
    assert who_am_i(browser) == (401, None)


def test_a_token_is_its_users(server: Server, browser: httpx.Client) -> None:
    token = token_of(browser, ALICE)
    assert who_am_i(browser, bearer(token)) == (200, "alice")
    with echo(server, bearer(token_of(browser, BOB))) as connection:
        assert say(connection, "hello") == "bob: hello"
    assert browser.post("/token", json={**BOB, "password": "red bicycle"}).status_code == 401
    assert browser.post("/token", json={**BOB, "user": "carol"}).status_code == 401


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(jwt.encode({"sub": "alice", "exp": time.time() + 900}, KEY[::-1]), id="signed by somebody else"),
        pytest.param(jwt.encode({"sub": "alice", "exp": time.time() + 900}, "", algorithm="none"), id="not signed"),
        pytest.param(jwt.encode({"sub": "alice", "exp": time.time() - 1}, KEY), id="expired"),
        pytest.param(jwt.encode({"sub": "alice"}, KEY), id="without an end"),
        pytest.param(jwt.encode({"exp": time.time() + 900}, KEY), id="without a user"),
        pytest.param("token-of-alice", id="no token"),
    ],
)
def test_another_token_is_refused(server: Server, browser: httpx.Client, token: str) -> None:
    assert who_am_i(browser, bearer(token)) == (401, None)
    with pytest.raises(InvalidStatus) as refused, echo(server, bearer(token)):
        pass
    assert refused.value.response.status_code == 401
    # Also beside a session that holds.
    browser.post("/login", json=ALICE)
    assert who_am_i(browser, bearer(token)) == (401, None)
    assert who_am_i(browser) == (200, "alice")


def test_a_user_id_that_breaks_a_rule_is_a_bad_request(browser: httpx.Client) -> None:
    token = jwt.encode({"sub": "undefined", "exp": time.time() + 900}, KEY)
    assert who_am_i(browser, bearer(token)) == (400, None)


def test_a_connection_ends_with_its_token(server: Server) -> None:
    with echo(server, bearer(jwt.encode({"sub": "alice", "exp": time.time() + 2}, KEY))) as connection:
        assert say(connection, "hello") == "alice: hello"
        assert close_code(connection) == 1008


def test_nobody_is_not_let_in(server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused, echo(server, {}):
        pass
    assert refused.value.response.status_code == 401


def test_a_page_of_another_site_cannot_use_the_cookie(server: Server, browser: httpx.Client) -> None:
    browser.post("/login", json=ALICE)
    headers = cookie(browser.cookies["session"]) | {"Origin": "https://evil.example"}
    with pytest.raises(InvalidStatus) as refused, echo(server, headers):
        pass
    assert refused.value.response.status_code == 403


def test_what_was_copied_before_signing_out_holds(server: Server, browser: httpx.Client) -> None:
    """As the guide says, of both."""
    browser.post("/login", json=ALICE)
    token, copied = token_of(browser, ALICE), browser.cookies["session"]
    assert browser.post("/logout").status_code == 200
    for headers in (bearer(token), cookie(copied)):
        with httpx.Client(base_url=server.url, trust_env=False) as thief:
            assert who_am_i(thief, headers) == (200, "alice")
