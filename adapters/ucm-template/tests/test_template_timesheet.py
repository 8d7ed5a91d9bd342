"""The timesheet on an app: who was clocked in, for how long, and what else the hooks do."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from ucm_middleware import (
    ConfigurationError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    UserContextMiddleware,
    agent_run,
    current_context,
    managed_user_context,
)
from ucm_middleware.types import Receive, Scope, Send
from ucm_template import Shift, Timesheet


class Clock:
    """Stands still until it is told to move on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timesheet(clock: Clock) -> Timesheet:
    return Timesheet(clock=clock)


@pytest.fixture
def manager(timesheet: Timesheet) -> UserContextManager:
    return UserContextManager(plugins=[timesheet])


def test_all_users_may_hold_the_timesheet_but_not_one_shift(timesheet: Timesheet, manager: UserContextManager) -> None:
    shift = Shift("alice", "request")
    alice, bob = (manager.create_isolated_context(user) for user in ("alice", "bob"))
    for context in (alice, bob):
        context.agent_context["timesheet"] = timesheet
    assert manager.isolation_report()
    for context in (alice, bob):
        context.agent_context["shift"] = shift
    (found,) = manager.isolation_report().findings
    assert str(found) == "alice.agent_context['shift'] is bob.agent_context['shift'] (Shift)"
    manager.cleanup_all_contexts()


class App:
    """Does what its path says."""

    def __init__(self, manager: UserContextManager, timesheet: Timesheet, clock: Clock) -> None:
        self.manager = manager
        self.timesheet = timesheet
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/login":
            current_context().bind("alice")
        if path == "/agent":
            async with agent_run(current_context(), "search"):
                self.timesheet.note("searching")
                self.clock.now += 2
        self.timesheet.note(path)
        self.clock.now += 5
        if path == "/fails":
            raise OSError("down")
        if path == "/steals":
            self.manager.get_context("bob")
        body = repr(self.timesheet.shifts()).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def client(manager: UserContextManager, timesheet: Timesheet, clock: Clock) -> httpx.AsyncClient:
    app = UserContextMiddleware(
        App(manager, timesheet, clock), manager=manager, identify=lambda connection: connection.headers.get("user")
    )
    # ASGITransport calls the app in the test's own task, and the firewall gives it a Context of its own all the same.
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def shifts_of(manager: UserContextManager, timesheet: Timesheet, user_id: str) -> list[Shift]:
    with manager.privileged(reason="the test looks", users=[user_id]):
        context = manager.create_isolated_context(user_id)
        async with managed_user_context(context):
            return timesheet.shifts()


async def test_a_request_is_clocked_in_and_out(
    client: httpx.AsyncClient, manager: UserContextManager, timesheet: Timesheet
) -> None:
    assert (await client.get("/work", headers={"user": "alice"})).text == "[]"
    (shift,) = await shifts_of(manager, timesheet, "alice")
    assert (shift.user_id, shift.notes, shift.seconds, shift.failed) == ("alice", ["/work"], 5.0, False)


async def test_a_request_that_fails_is_clocked_out_too(
    client: httpx.AsyncClient, manager: UserContextManager, timesheet: Timesheet
) -> None:
    assert (await client.get("/fails", headers={"user": "alice"})).status_code == 500
    (shift,) = await shifts_of(manager, timesheet, "alice")
    assert (shift.seconds, shift.failed) == (5.0, True)


async def test_an_agent_has_a_shift_of_its_own_within_the_request_s(
    client: httpx.AsyncClient, manager: UserContextManager, timesheet: Timesheet
) -> None:
    await client.get("/agent", headers={"user": "alice"})
    agent, request = await shifts_of(manager, timesheet, "alice")
    assert (agent.agent_name, agent.notes, agent.seconds) == ("search", ["searching"], 2.0)
    assert (request.agent_name, request.notes, request.seconds) == (None, ["/agent"], 7.0)


async def test_a_late_login_makes_the_shift_the_user_s(
    client: httpx.AsyncClient, manager: UserContextManager, timesheet: Timesheet
) -> None:
    assert (await client.get("/login")).status_code == 200
    (shift,) = await shifts_of(manager, timesheet, "alice")
    assert shift.user_id == "alice"


async def test_nobody_sees_another_s_shifts(
    client: httpx.AsyncClient, manager: UserContextManager, timesheet: Timesheet
) -> None:
    await asyncio.gather(*(client.get("/work", headers={"user": user}) for user in ("alice", "bob", "alice")))
    assert len(await shifts_of(manager, timesheet, "alice")) == 2
    assert (await client.get("/work", headers={"user": "carol"})).text == "[]"
    with pytest.raises(ContextNotFoundError):
        timesheet.shifts()


async def test_denials_are_counted(client: httpx.AsyncClient, timesheet: Timesheet) -> None:
    assert (await client.get("/steals", headers={"user": "alice"})).status_code == 403
    assert timesheet.denied == 1


def test_a_session_is_stamped_and_never_changes_hands(manager: UserContextManager) -> None:
    session = SimpleNamespace(info={})
    alice = manager.create_isolated_context("alice", db_session=session)
    assert alice.bind_session(session) is session
    with pytest.raises(CrossUserAccessError):
        manager.create_isolated_context("bob").bind_session(session)
    with pytest.raises(CrossUserAccessError):
        manager.create_isolated_context("bob", db_session=session)


async def test_where_it_is_no_plugin_it_says_so(timesheet: Timesheet) -> None:
    async with managed_user_context(UserContextManager().create_isolated_context("alice")):
        with pytest.raises(ConfigurationError, match="plugins="):
            timesheet.note("hello")


async def test_the_oldest_shifts_make_way(clock: Clock) -> None:
    timesheet = Timesheet(most=1, clock=clock)
    manager = UserContextManager(plugins=[timesheet])
    context = manager.create_isolated_context("alice")
    async with managed_user_context(context):
        for name in ("first", "second"):
            async with agent_run(context, name):
                pass
        assert [shift.agent_name for shift in timesheet.shifts()] == ["second"]


@pytest.mark.parametrize("most", [0, -1])
def test_a_bound_that_is_none_is_refused(most: int) -> None:
    with pytest.raises(ConfigurationError, match="most must be"):
        Timesheet(most=most)
