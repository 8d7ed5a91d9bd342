"""Sessions and their state: each user's own, on memory, SQLite and PostgreSQL; and what ADK does by itself."""

import asyncio
from typing import Any

import pytest
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions.base_session_service import BaseSessionService, GetSessionConfig
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.adk.sessions.session import Session
from google.genai import types

from ucm_google_adk import OwnedSessionService, SharedStateError
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
)
from ucm_middleware.testing import Users

OLD, NEW = "the secret of last year, thirty-two bytes", "the secret of this year, thirty-two bytes"


@pytest.fixture
def users() -> Users:
    return Users(UserContextManager())


def said(text: str, **state: Any) -> Event:
    actions = EventActions(state_delta=state) if state else EventActions()
    return Event(author="user", content=types.Content(role="user", parts=[types.Part(text=text)]), actions=actions)


def texts(session: Session | None) -> list[str]:
    assert session is not None
    return [part.text or "" for event in session.events if event.content for part in event.content.parts or []]


class TestWithoutTheAdapter:
    """What the owned service is for. If one of these fails, ADK has changed."""

    async def test_whoever_names_a_user_and_a_session_gets_it(self, service: BaseSessionService, app: str) -> None:
        session = await service.create_session(app_name=app, user_id="alice", session_id="chat")
        await service.append_event(session, said("alice's secret"))
        assert texts(await service.get_session(app_name=app, user_id="alice", session_id="chat")) == ["alice's secret"]
        everybody = await service.list_sessions(app_name=app)
        assert [each.user_id for each in everybody.sessions] == ["alice"]

    async def test_app_state_is_everybodys(self, service: BaseSessionService, app: str) -> None:
        session = await service.create_session(app_name=app, user_id="alice")
        await service.append_event(session, said("hello", **{"app:secret": "alice's"}))
        bobs = await service.create_session(app_name=app, user_id="bob")
        assert bobs.state["app:secret"] == "alice's"


class TestOwners:
    async def test_two_users_have_two_sessions_of_one_name(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        for user in ("alice", "bob"):
            with users.running(user):
                session = await owned.create_session(app_name=app, user_id=user, session_id="chat", state={"n": 1})
                assert (session.id, session.user_id, session.app_name, session.state) == ("chat", user, app, {"n": 1})
                await owned.append_event(session, said(f"{user}'s secret", **{"user:secret": user, "n": 2}))
                assert texts(session) == [f"{user}'s secret"]
        for user in ("alice", "bob"):
            with users.running(user):
                found = await owned.get_session(app_name=app, user_id=user, session_id="chat")
                assert texts(found) == [f"{user}'s secret"]
                assert found is not None
                assert found.state == {"n": 2, "user:secret": user}
                assert await owned.get_user_state(app_name=app, user_id=user) == {"secret": user}

    async def test_another_users_id_is_refused(self, service: BaseSessionService, app: str, users: Users) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            hers = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
        with users.running("bob"):
            for attempt in (
                lambda: owned.get_session(app_name=app, user_id="alice", session_id="chat"),
                lambda: owned.create_session(app_name=app, user_id="alice"),
                lambda: owned.list_sessions(app_name=app, user_id="alice"),
                lambda: owned.delete_session(app_name=app, user_id="alice", session_id="chat"),
                lambda: owned.get_user_state(app_name=app, user_id="alice"),
                lambda: owned.append_event(hers, said("from bob")),
            ):
                with pytest.raises(CrossUserAccessError):
                    await attempt()
            assert await owned.get_session(app_name=app, user_id="bob", session_id="chat") is None
            assert (await owned.list_sessions(app_name=app)).sessions == []
            forged = hers.model_copy(update={"user_id": "bob"})
            with pytest.raises(SessionNotFoundError) as refused:
                await owned.append_event(forged, said("from bob"))
            assert "ucm1_" not in str(refused.value)
        denied = users.manager.get_audit_trail("bob")
        assert denied is not None
        with users.running("alice"):
            assert texts(await owned.get_session(app_name=app, user_id="alice", session_id="chat")) == []

    async def test_a_listing_is_of_ones_own_and_has_the_clients_ids(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        for user in ("alice", "bob"):
            with users.running(user):
                for name in ("one", "two"):
                    await owned.create_session(app_name=app, user_id=user, session_id=name, state={"of": user})
                unnamed = await owned.create_session(app_name=app, user_id=user)
                listed = (await owned.list_sessions(app_name=app)).sessions
                assert {each.id for each in listed} == {"one", "two", unnamed.id}
                assert {each.user_id for each in listed} == {user}
                assert [each.state for each in listed if each.id == "one"] == [{"of": user}]

    async def test_a_service_that_stores_all_of_the_state_again_lists_it_still(self, app: str, users: Users) -> None:
        """As FirestoreSessionService does with each event."""

        class Whole(InMemorySessionService):
            async def append_event(self, session: Session, event: Event) -> Event:
                appended = await super().append_event(session, event)
                kept = {key: value for key, value in session.state.items() if not key.startswith(("user:", "temp:"))}
                self.sessions[session.app_name][session.user_id][session.id].state = kept
                return appended

        owned = OwnedSessionService(Whole())
        with users.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat", state={"n": 1})
            await owned.append_event(session, said("hello", **{"n": 2, "temp:t": 3, "user:u": 4}))
            assert session.state == {"n": 2, "temp:t": 3, "user:u": 4}
            (listed,) = (await owned.list_sessions(app_name=app)).sessions
            assert (listed.id, listed.state) == ("chat", {"n": 2, "user:u": 4})

    async def test_deleting_is_of_ones_own(self, service: BaseSessionService, app: str, users: Users) -> None:
        owned = OwnedSessionService(service)
        for user in ("alice", "bob"):
            with users.running(user):
                await owned.create_session(app_name=app, user_id=user, session_id="chat")
        with users.running("bob"):
            await owned.delete_session(app_name=app, user_id="bob", session_id="chat")
            assert await owned.get_session(app_name=app, user_id="bob", session_id="chat") is None
        with users.running("alice"):
            assert await owned.get_session(app_name=app, user_id="alice", session_id="chat") is not None

    async def test_nothing_of_a_user_id_is_in_the_store(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            await owned.create_session(app_name=app, user_id="alice", session_id="chat")
        (stored,) = (await service.list_sessions(app_name=app)).sessions
        assert stored.user_id.startswith("ucm1_")
        assert stored.id.startswith("ucm1_")

    async def test_in_no_context_and_after_it_nothing_works(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with pytest.raises(ContextNotFoundError):
            await owned.create_session(app_name=app, user_id="alice")
        with users.running("alice") as context:
            session = await owned.create_session(app_name=app, user_id="alice")
            context.close()
            with pytest.raises(ContextClosedError):
                await owned.append_event(session, said("too late"))

    async def test_an_id_is_used_once(self, service: BaseSessionService, app: str, users: Users) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            with pytest.raises(AlreadyExistsError, match="Session with id chat already exists"):
                await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            with pytest.raises(InvalidContextError, match="client_id"):
                await owned.create_session(app_name=app, user_id="alice", session_id="chat\n")

    async def test_events_can_be_asked_for_in_part_and_appended_after(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            for number in range(3):
                await owned.append_event(session, said(str(number)))
            last = GetSessionConfig(num_recent_events=1)
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat", config=last)
            assert texts(found) == ["2"]
            assert found is not None
            await owned.append_event(found, said("3"))
            whole = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert texts(whole) == ["0", "1", "2", "3"]
            assert (await owned.append_event(found, Event(author="user", partial=True))).partial
            await owned.flush()

    async def test_temporary_state_is_seen_and_not_kept(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            await owned.append_event(session, said("hello", **{"temp:step": 1}))
            assert session.state == {"temp:step": 1}
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert found is not None
            assert found.state == {}

    async def test_a_session_made_by_hand_can_be_appended_to(
        self, service: BaseSessionService, app: str, users: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with users.running("alice"):
            await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            by_hand = Session(id="chat", app_name=app, user_id="alice", last_update_time=2e9)
            await owned.append_event(by_hand, said("hello"))
            assert texts(await owned.get_session(app_name=app, user_id="alice", session_id="chat")) == ["hello"]


class TestAppState:
    async def test_it_is_refused_and_says_what_to_do(self, service: BaseSessionService, app: str, users: Users) -> None:
        bare = await service.create_session(app_name=app, user_id="somebody", state={"app:secret": "of old"})
        assert bare.state
        owned = OwnedSessionService(service)
        with users.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            assert session.state == {}
            with pytest.raises(SharedStateError, match=r"'app:secret' would be shared.*app_state='own'"):
                await owned.append_event(session, said("hello", **{"app:secret": "alice's"}))
            with pytest.raises(SharedStateError):
                await owned.create_session(app_name=app, user_id="alice", state={"app:secret": 1})
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert texts(found) == []
            assert [each.state for each in (await owned.list_sessions(app_name=app)).sessions] == [{}]

    async def test_each_user_can_have_one(self, service: BaseSessionService, app: str, users: Users) -> None:
        owned = OwnedSessionService(service, app_state="own")
        for user in ("alice", "bob"):
            with users.running(user):
                session = await owned.create_session(app_name=app, user_id=user, session_id="chat")
                assert session.state == {}
                assert session.app_name == app
                await owned.append_event(session, said("hello", **{"app:secret": user}))
        with users.running("alice"):
            other = await owned.create_session(app_name=app, user_id="alice")
            assert other.state == {"app:secret": "alice"}

    @pytest.mark.parametrize("key", ["ucm:session_id"])
    async def test_what_the_adapter_keeps_cannot_be_written(self, app: str, users: Users, key: str) -> None:
        owned = OwnedSessionService(InMemorySessionService())
        with users.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice")
            with pytest.raises(InvalidContextError, match="ucm:session_id"):
                await owned.append_event(session, said("hello", **{key: "another"}))


class TestChecks:
    async def test_a_store_that_gives_anothers_session_is_not_believed(self, app: str, users: Users) -> None:
        class Confused(InMemorySessionService):
            """A store whose index is broken: it gives everybody the first session."""

            async def get_session(self, **_: Any) -> Session | None:
                return next(iter(next(iter(self.sessions[app].values())).values())).model_copy(deep=True)

        owned = OwnedSessionService(Confused())
        with users.running("alice"):
            await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            assert await owned.get_session(app_name=app, user_id="alice", session_id="chat") is not None
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await owned.get_session(app_name=app, user_id="bob", session_id="chat")

    async def test_a_listing_without_state_still_has_the_clients_ids(self, app: str, users: Users) -> None:
        class Sparse(InMemorySessionService):
            async def list_sessions(self, **given: Any) -> Any:
                listed = await super().list_sessions(**given)
                for each in listed.sessions:
                    each.state = {}
                return listed

        owned = OwnedSessionService(Sparse())
        with users.running("alice"):
            await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            assert [each.id for each in (await owned.list_sessions(app_name=app)).sessions] == ["chat"]

    def test_what_is_no_service_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="give a session service"):
            OwnedSessionService("sqlite://")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="already"):
            OwnedSessionService(OwnedSessionService(InMemorySessionService()))
        with pytest.raises(ConfigurationError, match="'refuse' or 'own'"):
            OwnedSessionService(InMemorySessionService(), app_state="share")  # type: ignore[arg-type]


class TestRotation:
    """The secret changes: what stands under the previous one is the user's still, and is moved."""

    @pytest.fixture
    def before(self) -> Users:
        return Users(UserContextManager(secret=OLD))

    @pytest.fixture
    def during(self) -> Users:
        return Users(UserContextManager(secret=NEW, previous_secrets=[OLD]))

    @pytest.fixture
    def after(self) -> Users:
        return Users(UserContextManager(secret=NEW))

    @pytest.mark.parametrize("app_state", ["refuse", "own"])
    async def test_sessions_and_state_come_along(
        self, service: BaseSessionService, app: str, before: Users, during: Users, after: Users, app_state: Any
    ) -> None:
        owned = OwnedSessionService(service, app_state=app_state)
        apps = {"app:theme": "dark"} if app_state == "own" else {}
        with before.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat", state={"n": 1})
            await owned.append_event(session, said("one", **{"user:color": "red", "n": 2, **apps}))
            await owned.append_event(session, said("two", **{"user:size": "small"}))
            await owned.create_session(app_name=app, user_id="alice", session_id="left")
        with during.running("alice"):
            assert await owned.get_user_state(app_name=app, user_id="alice") == {"color": "red", "size": "small"}
            newer = await owned.create_session(app_name=app, user_id="alice", session_id="newer")
            assert newer.state == {"user:color": "red", "user:size": "small", **apps}
            await owned.append_event(newer, said("three", **{"user:color": "blue"}))
            listed = [each.id for each in (await owned.list_sessions(app_name=app)).sessions]
            assert sorted(listed) == ["chat", "left", "newer"]
            with pytest.raises(AlreadyExistsError):
                await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert texts(found) == ["one", "two"]
            await owned.delete_session(app_name=app, user_id="alice", session_id="left")
        with during.running("bob"):
            assert (await owned.list_sessions(app_name=app)).sessions == []
        with after.running("alice"):
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert texts(found) == ["one", "two"]
            assert found is not None
            assert found.state == {"n": 2, "user:color": "blue", "user:size": "small", **apps}
            listed = [each.id for each in (await owned.list_sessions(app_name=app)).sessions]
            assert sorted(listed) == ["chat", "newer"]
        if app_state == "refuse":  # and nothing is left behind
            assert len((await service.list_sessions(app_name=app)).sessions) == 2

    async def test_several_at_once_move_it_once(
        self, service: BaseSessionService, app: str, before: Users, during: Users
    ) -> None:
        owned = OwnedSessionService(service)
        with before.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            for number in range(3):
                await owned.append_event(session, said(str(number)))
        with during.running("alice"):
            asked = [owned.get_session(app_name=app, user_id="alice", session_id="chat") for _ in range(3)]
            assert [texts(found) for found in await asyncio.gather(*asked)] == [["0", "1", "2"]] * 3

    async def test_one_that_another_process_begins_to_move_goes_on(
        self, service: BaseSessionService, app: str, before: Users, during: Users, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owned = OwnedSessionService(service)
        with before.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            await owned.append_event(session, said("0"))
        create = service.create_session

        async def create_twice(**given: Any) -> Session:
            await create(**given)
            return await create(**given)

        with during.running("alice"):
            monkeypatch.setattr(service, "create_session", create_twice)
            assert texts(await owned.get_session(app_name=app, user_id="alice", session_id="chat")) == ["0"]

    async def test_a_move_that_broke_off_goes_on(
        self, service: BaseSessionService, app: str, before: Users, during: Users, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owned = OwnedSessionService(service)
        with before.running("alice"):
            session = await owned.create_session(app_name=app, user_id="alice", session_id="chat")
            for number in range(3):
                await owned.append_event(session, said(str(number)))
        append, left = service.append_event, iter(range(1))

        async def dies(session: Session, event: Event) -> Event:
            next(left)
            return await append(session, event)

        with during.running("alice"):
            monkeypatch.setattr(service, "append_event", dies)
            with pytest.raises((StopIteration, RuntimeError)):
                await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            monkeypatch.undo()
            found = await owned.get_session(app_name=app, user_id="alice", session_id="chat")
            assert texts(found) == ["0", "1", "2"]
