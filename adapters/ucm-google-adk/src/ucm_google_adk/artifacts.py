"""OwnedArtifactService: the artifacts of one user, in any of ADK's artifact services."""

from dataclasses import dataclass
from typing import Any, Final

from google.adk.artifacts import artifact_util
from google.adk.artifacts.base_artifact_service import ArtifactVersion, BaseArtifactService, ensure_part
from google.genai import types

from ucm_google_adk.owners import Moves, Owner, Owners, aligned, require_same_user
from ucm_middleware import ConfigurationError, UserExecutionContext


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an artifact stands inside, and where it stood under earlier secrets."""

    context: UserExecutionContext
    owner: Owner
    app_name: str
    user: str
    session: str | None
    earlier: list[tuple[str, str | None]]


class OwnedArtifactService(BaseArtifactService):
    """Keeps the artifacts of each user apart in ``service``, which is any of ADK's; those under ``user:`` too.

    The user is the one that the running code's context belongs to, whatever ``user_id`` says: another one raises
    CrossUserAccessError, and code in no context ContextNotFoundError. Users and sessions have other names inside, so
    that no id can reach out of its folder. References (``artifact://``) hold the names from outside, and may point to
    the running user's only. Raises ConfigurationError for what is no artifact service.
    """

    def __init__(self, service: BaseArtifactService) -> None:
        if not isinstance(service, BaseArtifactService):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"service is a {type(service).__name__}; give an artifact service of ADK, such as "
                "InMemoryArtifactService()"
            )
        if isinstance(service, OwnedArtifactService):
            raise ConfigurationError("service keeps its artifacts apart already; give the one that it was made with")
        self._service = service
        self._owners = Owners()
        self._moves = Moves()

    async def save_artifact(
        self,
        *,
        app_name: str,
        user_id: str,
        filename: str,
        artifact: types.Part | dict[str, Any],
        session_id: str | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> int:
        """Save a version of an artifact of the running user's, and return its number."""
        place = await self._settled(app_name, user_id, session_id, filename, "save_artifact")
        return await self._service.save_artifact(
            app_name=app_name,
            user_id=place.user,
            filename=filename,
            artifact=_inside(place, ensure_part(artifact)),
            session_id=place.session,
            custom_metadata=custom_metadata,
        )

    async def load_artifact(
        self,
        *,
        app_name: str,
        user_id: str,
        filename: str,
        session_id: str | None = None,
        version: int | None = None,
    ) -> types.Part | None:
        """A version of an artifact of the running user's, or None."""
        place = await self._settled(app_name, user_id, session_id, filename, "load_artifact")
        return await self._service.load_artifact(
            app_name=app_name, user_id=place.user, filename=filename, session_id=place.session, version=version
        )

    async def list_artifact_keys(self, *, app_name: str, user_id: str, session_id: str | None = None) -> list[str]:
        """The names of the running user's artifacts, in a session and under ``user:``."""
        place = self._place(app_name, user_id, session_id, "list_artifact_keys")
        names: set[str] = set()
        for user, session in [(place.user, place.session), *place.earlier]:
            names.update(await self._service.list_artifact_keys(app_name=app_name, user_id=user, session_id=session))
        return sorted(names)

    async def delete_artifact(
        self, *, app_name: str, user_id: str, filename: str, session_id: str | None = None
    ) -> None:
        """Delete an artifact of the running user's, all its versions."""
        place = self._place(app_name, user_id, session_id, "delete_artifact")
        for user, session in [(place.user, place.session), *place.earlier]:
            await self._service.delete_artifact(app_name=app_name, user_id=user, filename=filename, session_id=session)

    async def list_versions(
        self, *, app_name: str, user_id: str, filename: str, session_id: str | None = None
    ) -> list[int]:
        """The numbers of the versions of an artifact of the running user's."""
        place = await self._settled(app_name, user_id, session_id, filename, "list_versions")
        return await self._service.list_versions(
            app_name=app_name, user_id=place.user, filename=filename, session_id=place.session
        )

    async def list_artifact_versions(
        self, *, app_name: str, user_id: str, filename: str, session_id: str | None = None
    ) -> list[ArtifactVersion]:
        """What is known of the versions of an artifact of the running user's."""
        place = await self._settled(app_name, user_id, session_id, filename, "list_artifact_versions")
        return await self._service.list_artifact_versions(
            app_name=app_name, user_id=place.user, filename=filename, session_id=place.session
        )

    async def get_artifact_version(
        self,
        *,
        app_name: str,
        user_id: str,
        filename: str,
        session_id: str | None = None,
        version: int | None = None,
    ) -> ArtifactVersion | None:
        """What is known of a version of an artifact of the running user's, or None."""
        place = await self._settled(app_name, user_id, session_id, filename, "get_artifact_version")
        return await self._service.get_artifact_version(
            app_name=app_name, user_id=place.user, filename=filename, session_id=place.session, version=version
        )

    def _place(self, app_name: str, user_id: str, session_id: str | None, action: str) -> _Place:
        context, owner = self._owners.current(user_id, action)
        names: list[tuple[str, str | None]]
        if session_id is None:
            names = [(user, None) for user in owner.users]
        else:
            names = [(user, name) for user, name in aligned(owner.users, owner.sessions(context, session_id))]
        (user, session), *earlier = names
        return _Place(context, owner, app_name, user, session, earlier)

    async def _settled(self, app_name: str, user_id: str, session_id: str | None, filename: str, action: str) -> _Place:
        """Where an artifact stands, after what was under earlier secrets has been moved there."""
        place = self._place(app_name, user_id, session_id, action)
        for user, session in place.earlier:
            async with self._moves.only_one(f"{app_name}\n{user}\n{session}\n{filename}"):
                await self._move(place, user, session, filename)
        return place

    async def _move(self, place: _Place, user: str, session: str | None, filename: str) -> None:
        """Move all versions; the deleting comes last, and until then whoever asks goes on with the moving."""
        service, app_name = self._service, place.app_name
        old = await service.list_versions(app_name=app_name, user_id=user, filename=filename, session_id=session)
        if not old:
            return
        new = await service.list_versions(
            app_name=app_name, user_id=place.user, filename=filename, session_id=place.session
        )
        for version in sorted(old)[len(new) :]:
            part = await service.load_artifact(
                app_name=app_name, user_id=user, filename=filename, session_id=session, version=version
            )
            about = await service.get_artifact_version(
                app_name=app_name, user_id=user, filename=filename, session_id=session, version=version
            )
            await service.save_artifact(
                app_name=app_name,
                user_id=place.user,
                filename=filename,
                artifact=_ABSENT if part is None else part,
                session_id=place.session,
                custom_metadata=about.custom_metadata if about else None,
            )
        await service.delete_artifact(app_name=app_name, user_id=user, filename=filename, session_id=session)


# What ADK saves as the version that takes an artifact away, when a session is rewound.
_ABSENT: Final = types.Part(inline_data=types.Blob(mime_type="application/octet-stream", data=b""))


def _inside(place: _Place, part: types.Part) -> types.Part:
    """A reference with the names that its target has inside; anything else as it is."""
    if not artifact_util.is_artifact_ref(part) or part.file_data is None or part.file_data.file_uri is None:
        return part
    target = artifact_util.parse_artifact_uri(part.file_data.file_uri)
    if target is None:
        return part
    context, owner = place.context, place.owner
    require_same_user(context, target.user_id, "save_artifact")
    uri = artifact_util.get_artifact_uri(
        target.app_name,
        owner.user,
        target.filename,
        target.version,
        None if target.session_id is None else owner.sessions(context, target.session_id)[0],
    )
    return part.model_copy(update={"file_data": part.file_data.model_copy(update={"file_uri": uri})})
