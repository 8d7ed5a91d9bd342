"""A plugin on real servers: it identifies, wraps, binds and is told. A wrong one keeps the server from starting."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from support.distributions import Shelf
from support.fixtures import ServerFactory
from support.observer import Observer, client, observing
from support.servers import Server
from support.waiting import wait_until

APPS = Path(__file__).parent / "apps"


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_plugins:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def course(desk: Observer, user: str) -> list[str]:
    """What happened in the name of one user, in order."""
    return [entry["what"] for entry in desk.journal(user=user)]


def wait_for_the_end(desk: Observer, user: str, contexts: int = 1) -> None:
    """Until so many contexts of a user have closed: they are live no more as soon as their teardown begins."""
    wait_until(lambda: course(desk, user).count("closed") == contexts, f"{contexts} contexts of {user} have closed")


def test_a_plugin_identifies_and_wraps_the_request(desk: Observer) -> None:
    for number in (1, 2):  # on one keep-alive connection as on another: what the first set, the second does not see
        seen = desk.request("alice", "/who").json()
        assert seen == {"user": "alice", "wrapped_in": ["context"]}
        wait_for_the_end(desk, "alice", number)
    assert course(desk, "alice") == ["opened", "enter context", "leave context", "closed"] * 2


def test_what_one_request_is_wrapped_in_the_next_on_its_connection_is_not(desk: Observer) -> None:
    with client(desk.server) as connection:
        for user in ("alice", "bob", "alice"):
            seen = connection.get("/who", headers={"Authorization": f"Bearer token-of-{user}"}).json()
            assert seen == {"user": user, "wrapped_in": ["context"]}


@pytest.mark.security
def test_a_plugin_refuses_and_the_app_never_runs(desk: Observer) -> None:
    refused = desk.request(None, "/who", headers={"Authorization": "Bearer forged"})
    assert refused.status_code == 401
    assert desk.journal() == []


@pytest.mark.security
def test_nobody_is_nobody(desk: Observer) -> None:
    assert desk.request(None, "/who").json()["user"].startswith("anonymous_")
    assert desk.request(None, "/work").status_code == 401


def test_a_synchronous_handler_binds_its_session_in_its_thread(desk: Observer) -> None:
    seen = desk.request("alice", "/who-in-a-thread").json()
    assert seen == {"user": "alice", "session": "alice", "wrapped_in": ["context"]}


def test_a_late_login_is_told(desk: Observer) -> None:
    assert desk.request(None, "/login?user=alice").json() == {"user": "alice"}
    visitor = desk.wait_for("bound")["before"]
    assert visitor.startswith("anonymous_")
    assert course(desk, visitor) == ["opened", "enter context"]
    wait_for_the_end(desk, "alice")
    assert course(desk, "alice") == ["bound", "leave context", "closed"]


def test_resources_and_agent_runs_are_wrapped_sessions_bound_keys_derived(desk: Observer) -> None:
    seen = desk.request("alice", "/work").json()
    assert seen == {
        "session": "alice",
        "run": {"user": "alice", "wrapped_in": ["context", "resource", "run"], "is_run": True},
        "after": ["context", "resource"],
        "key": "alice/thread/7",
    }
    wait_for_the_end(desk, "alice", 2)
    assert course(desk, "alice") == [
        "opened",
        "enter context",
        "enter resource",
        "connect",
        "opened",
        "enter run",
        "leave run",
        "closed",
        "disconnect",
        "leave resource",
        "leave context",
        "closed",
    ]


@pytest.mark.security
def test_a_session_that_cannot_be_bound_is_not_handed_out(desk: Observer) -> None:
    assert desk.request("alice", "/broken-session").status_code == 500
    wait_for_the_end(desk, "alice")
    assert course(desk, "alice")[-3:] == ["error in context", "leave context", "closed"]


@pytest.mark.security
def test_a_denial_is_told_without_whose_it_was(desk: Observer) -> None:
    held = desk.begin("bob", "/hold")
    desk.wait_for("held", user="bob")
    assert desk.request("alice", "/steal").status_code == 403
    assert desk.journal("denied") == [{"what": "denied", "user": "alice", "action": "get_context"}]
    desk.open("let go")
    assert held.result().json() == "bob"


def test_a_client_that_leaves_ends_what_wraps_its_request(desk: Observer) -> None:
    with client(desk.server) as connection, pytest.raises(Exception, match="timed out"):
        connection.get("/hold", headers={"Authorization": "Bearer token-of-alice"}, timeout=0.5)
    assert desk.wait_for("closed", user="alice")["reason"] == "disconnected"
    assert course(desk, "alice") == [
        "opened",
        "enter context",
        "held",
        "error in context",
        "leave context",
        "closed",
    ]


def test_messages_are_wrapped_one_by_one(desk: Observer) -> None:
    with desk.websocket("alice", "/ws") as websocket:
        for text in ("one", "two"):
            websocket.send(text)
            assert json.loads(websocket.recv()) == {"text": text, "wrapped_in": ["context", "message"]}
    desk.wait_for("closed", user="alice")
    assert [(entry["what"], entry.get("text")) for entry in desk.journal(user="alice")] == [
        ("opened", None),
        ("enter context", None),
        ("enter message", "one"),
        ("leave message", "one"),
        ("enter message", "two"),
        ("leave message", "two"),
        ("leave context", None),
        ("closed", None),
    ]


@pytest.mark.security
def test_a_message_that_a_plugin_refuses_ends_the_connection_unhandled(desk: Observer) -> None:
    with desk.websocket("alice", "/ws") as websocket:
        websocket.send("forbidden")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008


def test_a_notification_that_fails_is_logged_with_its_plugin_and_breaks_nothing(desk: Observer) -> None:
    assert desk.request("alice", "/who").status_code == 200
    desk.server.wait_for_output("ucm_context_closed of plugin 'promise_plugins.Plugin'")


class TestDeployment:
    """The plugins that the environment of a server names, from distributions that are really installed."""

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> Shelf:
        return Shelf(tmp_path)

    def environment(self, shelf: Shelf, **more: str) -> dict[str, str | None]:
        spec = find_spec("ucm_middleware")
        assert spec is not None
        assert spec.submodule_search_locations
        core = Path(spec.submodule_search_locations[0]).parent
        return {"PYTHONPATH": os.pathsep.join(map(str, (APPS, core, shelf.folder))), **more}

    def marking(self, shelf: Shelf, **options: Any) -> None:
        code = """
            from ucm_middleware import hookimpl

            @hookimpl
            def ucm_context_opened(context):
                print(f"the deployment's plugin saw {context.user_id}", flush=True)
        """
        shelf.install("ucm-marking", code, **options)

    def test_one_that_is_named_is_served(self, shelf: Shelf, server_factory: ServerFactory) -> None:
        self.marking(shelf)
        server = server_factory(
            "uvicorn-h11", "promise_plugins:app", env=self.environment(shelf, UCM_PLUGINS="marking")
        )
        with observing(server) as desk:
            assert desk.request("alice", "/who").status_code == 200
        server.wait_for_output("the deployment's plugin saw alice")

    @pytest.mark.security
    @pytest.mark.parametrize("settings", [{}, {"UCM_PLUGINS": "marking", "UCM_DISABLE_PLUGIN_AUTOLOAD": "1"}])
    def test_one_that_is_not_allowed_is_not(
        self, shelf: Shelf, server_factory: ServerFactory, settings: dict[str, str]
    ) -> None:
        self.marking(shelf)
        server = server_factory("uvicorn-h11", "promise_plugins:app", env=self.environment(shelf, **settings))
        with observing(server) as desk:
            assert desk.request("alice", "/who").status_code == 200
            wait_until(lambda: bool(desk.journal("opened")), "the app's own plugin was told")
        assert "the deployment's plugin" not in server.output

    @pytest.mark.security
    def test_one_that_is_wrong_keeps_the_server_from_starting(
        self, shelf: Shelf, server_factory: ServerFactory
    ) -> None:
        self.marking(shelf, requires=["ucm-middleware<0.0.1"])
        with pytest.raises(AssertionError, match="ended while starting") as raised:
            server_factory("uvicorn-h11", "promise_plugins:app", env=self.environment(shelf, UCM_PLUGINS="marking"))
        told = str(raised.value)
        assert "plugin 'marking' (ucm-marking 1.5): it requires ucm-middleware<0.0.1" in told
        assert "install a version of the plugin for ucm-middleware" in told
