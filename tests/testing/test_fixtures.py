"""The fixtures, used as an application's tests use them, and the plugin that brings them."""

import asyncio
import sys
from pathlib import Path

import httpx
import pytest

from _ucm_middleware_pytest import ServerFactory
from ucm_middleware import (
    ContextClosedError,
    ContextNotFoundError,
    UserContextManager,
    current_context,
    managed_user_context,
)
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.testing import FakeClock, RecordingLedger, Users, closing_contexts
from ucm_middleware.testing.server import ServerKind

APP = """
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            step = (await receive())["type"]
            await send({"type": f"{step}.complete"})
            if step == "lifespan.shutdown":
                return
    print("asked for", scope["path"])
    if scope["path"] == "/die":
        os._exit(3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": os.environ["GREETING"].encode()})
"""


def test_users_are_distinct_and_valid(ucm_users: Users) -> None:
    names = ucm_users.take(30)
    assert names[:2] == ["alice", "bob"]
    assert len(set(names)) == 30
    assert {ucm_users.context(name).user_id for name in names} == set(names)


def test_a_block_runs_as_a_user(ucm_users: Users) -> None:
    with ucm_users.running(agent_context={"cart": []}) as context:
        assert current_context() is context
        assert context.user_id == "alice"
    assert not context.is_open


def test_the_clock_closes_what_expires(ucm_manager: UserContextManager, ucm_clock: FakeClock, ucm_users: Users) -> None:
    released: list[str] = []
    context = ucm_manager.create_isolated_context(ucm_users.new(), ttl_seconds=60)
    context.callback(released.append, "pool")
    ucm_clock.advance(59.9)
    assert context.is_open
    ucm_clock.advance(0.1)
    assert context.lifetime.reason == "expired"
    assert released == ["pool"]


async def test_the_clock_cuts_off_what_runs(
    ucm_manager: UserContextManager, ucm_clock: FakeClock, ucm_users: Users
) -> None:
    with pytest.raises(ContextClosedError, match="expired"):
        async with asyncio.timeout(10), managed_user_context(ucm_users.context(ttl_seconds=60)):
            ucm_clock.advance(60)
            await asyncio.Event().wait()


def test_the_clock_never_goes_back(ucm_clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="never goes back"):
        ucm_clock.advance(-1)


def test_the_clock_refuses_a_manager_that_is_on_another(ucm_clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="another clock"):
        ucm_clock.attach(UserContextManager())


def test_the_ledger_has_each_record(
    ucm_manager: UserContextManager, ucm_ledger: RecordingLedger, ucm_users: Users
) -> None:
    alice, bob = ucm_users.take(2)
    for name in (alice, bob, alice):
        ucm_users.context(name).close()
    assert [record.event for record in ucm_ledger.records] == ["opened", "closed"] * 3
    assert [record.user_id for record in ucm_ledger.select("opened")] == [alice, bob, alice]
    assert [record.event for record in ucm_ledger.select(user=bob)] == ["opened", "closed"]
    assert ucm_ledger.select("opened", user=None) == []
    kept = ucm_ledger.trail(alice)
    assert kept is not None
    assert kept.opening is ucm_ledger.select("opened", user=alice)[-1]
    trail = ucm_manager.get_audit_trail(alice)
    assert trail is not None
    assert [event["event"] for event in trail["events"]] == ["opened", "closed"] * 2
    assert ucm_manager.get_audit_trail("carol") is None


def test_a_manager_is_closed_at_the_end() -> None:
    released: list[str] = []
    with closing_contexts(UserContextManager()) as manager:
        context = manager.create_isolated_context("alice")
        context.callback(released.append, "pool")
        manager.serve()  # code outside of any context may not touch contexts now: this is no such code
    assert released == ["pool"]
    assert not context.is_open


def test_a_manager_is_closed_also_when_the_block_fails() -> None:
    manager = UserContextManager()
    context = manager.create_isolated_context("alice")
    with pytest.raises(OSError, match="the test's"), closing_contexts(manager):
        raise OSError("the test's")
    assert not context.is_open


@pytest.mark.ucm_leaks("a resource cannot be released, and that is reported")
def test_a_manager_that_cannot_be_closed_says_what_is_held() -> None:
    class Pool:
        async def aclose(self) -> None: ...

    with (
        pytest.raises(AssertionError, match=r"the pool \(unclosed\); context of user 'alice'"),
        closing_contexts(UserContextManager()) as manager,
    ):
        manager.create_isolated_context("alice").closing(Pool(), name="the pool")


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn", "granian"])
def test_a_real_server(ucm_server: ServerFactory, tmp_path: Path, kind: ServerKind) -> None:
    (tmp_path / "greeter.py").write_text(APP)
    server = ucm_server("greeter:app", kind=kind, app_dir=tmp_path, env={"GREETING": "hello"})
    assert httpx.get(server.url + "/there", verify=False).text == "hello"
    server.wait_for_output("asked for /there")
    server.stop()
    assert server.returncode is not None


def test_the_session_fails_when_a_server_dies(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(greeter=APP)
    pytester.makepyfile(
        """
        import http.client
        import pytest

        def test_it(ucm_server):
            server = ucm_server("greeter:app")
            with pytest.raises(http.client.RemoteDisconnected):
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.request("GET", "/die")
                connection.getresponse()
            connection.close()
            server._process.wait()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:asyncio")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ended by itself (exit status 3). Its output:*", "*asked for /die*"])


def test_a_server_that_is_not_there_is_named(ucm_server: ServerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm_middleware.testing.server.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="hypercorn is not installed"):
        ucm_server("greeter:app", kind="hypercorn")


def test_an_app_that_does_not_start_is_shown(ucm_server: ServerFactory) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ended while starting.*no_such_module"):
        ucm_server("no_such_module:app")


def test_a_manager_of_ones_own_takes_the_place(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest
        from ucm_middleware import UserContextManager
        from ucm_middleware.testing import closing_contexts

        @pytest.fixture
        def ucm_manager(ucm_clock):
            with closing_contexts(UserContextManager(clock=ucm_clock, max_contexts_per_user=3)) as manager:
                yield ucm_clock.attach(manager)
        """
    )
    pytester.makepyfile(
        """
        def test_it(ucm_users, ucm_manager):
            assert ucm_users.manager is ucm_manager
            assert ucm_manager._registry.limits.per_user == 3
        """
    )
    pytester.runpytest_subprocess("--ucm-strict", "-p", "no:asyncio").assert_outcomes(passed=1)


def test_a_session_that_uses_no_fixture_imports_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys
        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("ucm_middleware")
            assert not [name for name in sys.modules if name.startswith(("ucm_middleware", "starlette", "uvicorn"))]
        """
    )
    pytester.runpytest_subprocess("-p", "no:asyncio", "-W", "error").assert_outcomes(passed=1)


def test_the_package_and_its_helpers_import_without_pytest(pytester: pytest.Pytester) -> None:
    source = "import sys; sys.modules['pytest'] = None; import ucm_middleware, ucm_middleware.testing"
    assert pytester.run(sys.executable, "-c", source).ret == 0


def test_lines_that_an_import_runs_are_measured(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "COV_CORE_SOURCE"):
        monkeypatch.delenv(variable, raising=False)
    pytester.makepyfile("def test_it(ucm_manager): pass")
    options = ("--cov=ucm_middleware", "--cov-report=term-missing", "--ucm-strict", "-p", "no:asyncio")
    result = pytester.runpytest_subprocess(*options)
    result.assert_outcomes(passed=1)
    [errors] = [line for line in result.outlines if "ucm_middleware/types.py" in line]
    assert errors.split()[1:] == ["9", "0", "100%"]


def test_nothing_is_running_outside() -> None:
    with pytest.raises(ContextNotFoundError):
        current_context()
