"""Memories and artifacts: each user's own; and what ADK does by itself."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.adk.artifacts.artifact_util import get_artifact_uri
from google.adk.artifacts.base_artifact_service import BaseArtifactService
from google.adk.artifacts.file_artifact_service import FileArtifactService
from google.adk.artifacts.in_memory_artifact_service import InMemoryArtifactService
from google.adk.events.event import Event
from google.adk.memory.in_memory_memory_service import InMemoryMemoryService
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.genai import types

from ucm_google_adk import OwnedArtifactService, OwnedMemoryService, OwnedSessionService
from ucm_middleware import ConfigurationError, ContextNotFoundError, CrossUserAccessError, UserContextManager
from ucm_middleware.testing import Users

OLD, NEW = "the secret of last year, thirty-two bytes", "the secret of this year, thirty-two bytes"
APP = "shop"


@pytest.fixture
def users() -> Users:
    return Users(UserContextManager())


@pytest.fixture(params=["memory", "files"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> BaseArtifactService:
    return InMemoryArtifactService() if request.param == "memory" else FileArtifactService(tmp_path)


def said(text: str) -> Event:
    return Event(author="user", content=types.Content(role="user", parts=[types.Part(text=text)]))


def data(text: str) -> types.Part:
    return types.Part(inline_data=types.Blob(mime_type="text/plain", data=text.encode()))


def text_of(part: types.Part | None) -> str | None:
    return None if part is None or part.inline_data is None else (part.inline_data.data or b"").decode()


async def found_by(service: OwnedMemoryService | InMemoryMemoryService, user: str) -> list[str]:
    found = await service.search_memory(app_name=APP, user_id=user, query="secret")
    return [part.text or "" for entry in found.memories for part in entry.content.parts or []]


class TestWithoutTheAdapter:
    """What the owned services are for. If one of these fails, ADK has changed."""

    async def test_whoever_names_a_user_gets_the_memories(self) -> None:
        bare = InMemoryMemoryService()
        await bare.add_events_to_memory(app_name=APP, user_id="alice", events=[said("alice's secret")])
        assert await found_by(bare, "alice") == ["alice's secret"]

    async def test_two_users_can_name_one_artifact(self) -> None:
        """Ids are joined with slashes, which they may hold."""
        bare = InMemoryArtifactService()
        given = {"app_name": APP, "artifact": data("alice's secret")}
        await bare.save_artifact(user_id="a", session_id="b", filename="c/file", **given)  # type: ignore[arg-type]
        stolen = await bare.load_artifact(app_name=APP, user_id="a/b", session_id="c", filename="file")
        assert text_of(stolen) == "alice's secret"


class TestMemories:
    async def test_each_user_finds_ones_own(self, users: Users) -> None:
        sessions, owned = OwnedSessionService(InMemorySessionService()), OwnedMemoryService(InMemoryMemoryService())
        for user in ("alice", "bob"):
            with users.running(user):
                session = await sessions.create_session(app_name=APP, user_id=user, session_id="chat")
                await sessions.append_event(session, said(f"{user}'s secret"))
                await owned.add_session_to_memory(session)
                more = [said(f"another secret of {user}")]
                await owned.add_events_to_memory(app_name=APP, user_id=user, events=more, session_id="chat")
                await owned.add_events_to_memory(app_name=APP, user_id=user, events=[said(f"{user}: secret")])
        for user in ("alice", "bob"):
            with users.running(user):
                expected = [f"{user}'s secret", f"another secret of {user}", f"{user}: secret"]
                assert await found_by(owned, user) == expected

    async def test_another_users_id_is_refused(self, users: Users) -> None:
        sessions, owned = OwnedSessionService(InMemorySessionService()), OwnedMemoryService(InMemoryMemoryService())
        with users.running("alice"):
            hers = await sessions.create_session(app_name=APP, user_id="alice", session_id="chat")
        with users.running("bob"):
            for attempt in (
                lambda: owned.add_session_to_memory(hers),
                lambda: owned.add_events_to_memory(app_name=APP, user_id="alice", events=[said("from bob")]),
                lambda: owned.add_memory(app_name=APP, user_id="alice", memories=[]),
                lambda: owned.search_memory(app_name=APP, user_id="alice", query="secret"),
                lambda: owned.delete_memory(app_name=APP, user_id="alice", memory_id="1"),
            ):
                with pytest.raises(CrossUserAccessError):
                    await attempt()
        with pytest.raises(ContextNotFoundError):
            await owned.search_memory(app_name=APP, user_id="alice", query="secret")

    async def test_what_a_service_cannot_do_it_says(self, users: Users) -> None:
        owned = OwnedMemoryService(InMemoryMemoryService())
        with users.running("alice"), pytest.raises(NotImplementedError):
            await owned.add_memory(app_name=APP, user_id="alice", memories=[])

    async def test_one_can_be_forgotten(self, users: Users) -> None:
        owned = OwnedMemoryService(InMemoryMemoryService())
        event = said("alice's secret")
        with users.running("alice"):
            await owned.add_events_to_memory(app_name=APP, user_id="alice", events=[event])
        with users.running("bob"):
            await owned.delete_memory(app_name=APP, user_id="bob", memory_id=event.id)
        with users.running("alice"):
            assert await found_by(owned, "alice") == ["alice's secret"]
            await owned.delete_memory(app_name=APP, user_id="alice", memory_id=event.id)
            assert await found_by(owned, "alice") == []

    async def test_in_a_rotation_both_are_searched(self) -> None:
        owned = OwnedMemoryService(InMemoryMemoryService())
        with Users(UserContextManager(secret=OLD)).running("alice"):
            await owned.add_events_to_memory(app_name=APP, user_id="alice", events=[said("an old secret")])
        during = Users(UserContextManager(secret=NEW, previous_secrets=[OLD]))
        with during.running("alice"):
            await owned.add_events_to_memory(app_name=APP, user_id="alice", events=[said("a new secret")])
            assert await found_by(owned, "alice") == ["a new secret", "an old secret"]
        with during.running("bob"):
            assert await found_by(owned, "bob") == []


class TestArtifacts:
    @pytest.mark.parametrize("name", ["notes.txt", "user:notes.txt"])
    async def test_each_user_has_ones_own(self, users: Users, files: BaseArtifactService, name: str) -> None:
        owned = OwnedArtifactService(files)
        for user in ("alice", "bob"):
            at: dict[str, Any] = {"app_name": APP, "user_id": user, "session_id": "chat", "filename": name}
            with users.running(user):
                assert await owned.save_artifact(**at, artifact=data("draft"), custom_metadata={"by": user}) == 0
                assert await owned.save_artifact(**at, artifact=data(f"{user}'s secret")) == 1
        for user in ("alice", "bob"):
            at = {"app_name": APP, "user_id": user, "session_id": "chat", "filename": name}
            with users.running(user):
                assert text_of(await owned.load_artifact(**at)) == f"{user}'s secret"
                assert text_of(await owned.load_artifact(**at, version=0)) == "draft"
                assert await owned.list_versions(**at) == [0, 1]
                assert [each.version for each in await owned.list_artifact_versions(**at)] == [0, 1]
                first = await owned.get_artifact_version(**at, version=0)
                assert first is not None
                assert first.custom_metadata == {"by": user}
                names = await owned.list_artifact_keys(app_name=APP, user_id=user, session_id="chat")
                assert names == [name]
                # In another session only what is the user's.
                assert bool(await owned.load_artifact(**{**at, "session_id": "other"})) is name.startswith("user:")
                listed = await owned.list_artifact_keys(app_name=APP, user_id=user)
                assert bool(listed) is name.startswith("user:")
                await owned.delete_artifact(**at)
                assert await owned.load_artifact(**at) is None

    async def test_another_users_id_is_refused(self, users: Users, files: BaseArtifactService) -> None:
        owned = OwnedArtifactService(files)
        at: dict[str, Any] = {"app_name": APP, "user_id": "alice", "session_id": "chat", "filename": "notes.txt"}
        with users.running("alice"):
            await owned.save_artifact(**at, artifact=data("alice's secret"))
        attempts: list[Callable[[], Any]] = [
            lambda: owned.save_artifact(**at, artifact=data("from bob")),
            lambda: owned.load_artifact(**at),
            lambda: owned.list_artifact_keys(app_name=APP, user_id="alice", session_id="chat"),
            lambda: owned.delete_artifact(**at),
            lambda: owned.list_versions(**at),
            lambda: owned.list_artifact_versions(**at),
            lambda: owned.get_artifact_version(**at),
        ]
        with users.running("bob"):
            for attempt in attempts:
                with pytest.raises(CrossUserAccessError):
                    await attempt()
            assert await owned.load_artifact(**{**at, "user_id": "bob"}) is None
        for attempt in attempts:
            with pytest.raises(ContextNotFoundError):
                await attempt()

    async def test_ids_cannot_reach_out_of_their_folder(self, users: Users, files: BaseArtifactService) -> None:
        owned = OwnedArtifactService(files)
        with users.running("a"):
            await owned.save_artifact(
                app_name=APP, user_id="a", session_id="b", filename="c/file", artifact=data("a's secret")
            )
        with users.running("a/b"):
            stolen = await owned.load_artifact(app_name=APP, user_id="a/b", session_id="c", filename="file")
            assert stolen is None
            kept = {"app_name": APP, "user_id": "a/b", "session_id": "../b", "filename": "mine"}
            await owned.save_artifact(**kept, artifact=data("of a/b"))  # type: ignore[arg-type]
            assert text_of(await owned.load_artifact(**kept)) == "of a/b"  # type: ignore[arg-type]

    async def test_a_reference_leads_to_ones_own_only(self, users: Users) -> None:
        owned = OwnedArtifactService(InMemoryArtifactService())  # the one on files keeps no references

        def reference(user: str, session: str | None, filename: str) -> types.Part:
            uri = get_artifact_uri(APP, user, filename, 0, session)
            return types.Part(file_data=types.FileData(file_uri=uri, mime_type="text/plain"))

        for name in ("notes.txt", "user:notes.txt"):
            session = None if name.startswith("user:") else "chat"
            with users.running("alice"):
                at: dict[str, Any] = {"app_name": APP, "user_id": "alice", "session_id": "chat"}
                await owned.save_artifact(**at, filename=name, artifact=data("alice's secret"))
                await owned.save_artifact(**at, filename="link", artifact=reference("alice", session, name))
                assert text_of(await owned.load_artifact(**at, filename="link")) == "alice's secret"
            with users.running("bob"):
                at = {"app_name": APP, "user_id": "bob", "session_id": "chat"}
                with pytest.raises(CrossUserAccessError):
                    await owned.save_artifact(**at, filename="link", artifact=reference("alice", session, name))
                broken = types.Part(file_data=types.FileData(file_uri="artifact://nowhere", mime_type="text/plain"))
                with pytest.raises(Exception, match="Invalid artifact reference"):
                    await owned.save_artifact(**at, filename="link", artifact=broken)

    async def test_in_a_rotation_they_come_along(self, files: BaseArtifactService) -> None:
        owned = OwnedArtifactService(files)
        at: dict[str, Any] = {"app_name": APP, "user_id": "alice", "session_id": "chat"}
        with Users(UserContextManager(secret=OLD)).running("alice"):
            for name in ("notes.txt", "user:notes.txt", "left.txt"):
                await owned.save_artifact(**at, filename=name, artifact=data("one"), custom_metadata={"n": 1})
                await owned.save_artifact(**at, filename=name, artifact=data("two"))
        during = Users(UserContextManager(secret=NEW, previous_secrets=[OLD]))
        with during.running("alice"):
            assert await owned.list_artifact_keys(app_name=APP, user_id="alice", session_id="chat")
            several = [owned.load_artifact(**at, filename="notes.txt") for _ in range(3)]
            assert [text_of(part) for part in await asyncio.gather(*several)] == ["two"] * 3
            assert await owned.save_artifact(**at, filename="notes.txt", artifact=data("three")) == 2
            assert text_of(await owned.load_artifact(**at, filename="user:notes.txt")) == "two"
            await owned.delete_artifact(**at, filename="left.txt")
        with during.running("bob"):
            assert await owned.list_artifact_keys(app_name=APP, user_id="bob", session_id="chat") == []
        with Users(UserContextManager(secret=NEW)).running("alice"):
            assert await owned.list_versions(**at, filename="notes.txt") == [0, 1, 2]
            assert text_of(await owned.load_artifact(**at, filename="notes.txt", version=0)) == "one"
            about = await owned.get_artifact_version(**at, filename="notes.txt", version=0)
            assert about is not None
            assert about.custom_metadata == {"n": 1}
            assert await owned.list_artifact_keys(app_name=APP, user_id="alice", session_id="chat") == [
                "notes.txt",
                "user:notes.txt",
            ]


def test_what_is_no_service_is_refused() -> None:
    for owned, bare in (
        (OwnedMemoryService, InMemoryMemoryService()),
        (OwnedArtifactService, InMemoryArtifactService()),
    ):
        make: Any = owned
        with pytest.raises(ConfigurationError, match=r"give an? .* service of ADK"):
            make("memory")
        with pytest.raises(ConfigurationError, match="already"):
            make(make(bare))
