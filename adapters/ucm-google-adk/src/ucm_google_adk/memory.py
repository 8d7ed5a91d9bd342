"""OwnedMemoryService: the memories of one user, in any of ADK's memory services."""

from collections.abc import Mapping, Sequence

from google.adk.events.event import Event
from google.adk.memory.base_memory_service import BaseMemoryService, SearchMemoryResponse
from google.adk.memory.memory_entry import MemoryEntry
from google.adk.sessions.session import Session

from ucm_google_adk.owners import Owners
from ucm_middleware import ConfigurationError


class OwnedMemoryService(BaseMemoryService):
    """Keeps the memories of each user apart in ``service``, which is any of ADK's.

    The user is the one that the running code's context belongs to, whatever ``user_id`` says: another one raises
    CrossUserAccessError, and code in no context ContextNotFoundError. Users and sessions have other names inside.

    Memories under a previous secret are found and deleted, as long as that secret is known, and stay where they are:
    ADK has no way to move them. Raises ConfigurationError for what is no memory service.
    """

    def __init__(self, service: BaseMemoryService) -> None:
        if not isinstance(service, BaseMemoryService):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"service is a {type(service).__name__}; give a memory service of ADK, such as InMemoryMemoryService()"
            )
        if isinstance(service, OwnedMemoryService):
            raise ConfigurationError("service keeps its memories apart already; give the one that it was made with")
        self._service = service
        self._owners = Owners()

    async def add_session_to_memory(self, session: Session) -> None:
        """Remember a session of the running user's."""
        context, owner = self._owners.current(session.user_id, "add_session_to_memory")
        inside = Session.model_construct(
            id=owner.sessions(context, session.id)[0],
            app_name=session.app_name,
            user_id=owner.user,
            state=session.state,
            events=session.events,
            last_update_time=session.last_update_time,
        )
        await self._service.add_session_to_memory(inside)

    async def add_events_to_memory(
        self,
        *,
        app_name: str,
        user_id: str,
        events: Sequence[Event],
        session_id: str | None = None,
        custom_metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Remember events of the running user's."""
        context, owner = self._owners.current(user_id, "add_events_to_memory")
        await self._service.add_events_to_memory(
            app_name=app_name,
            user_id=owner.user,
            events=events,
            session_id=None if session_id is None else owner.sessions(context, session_id)[0],
            custom_metadata=custom_metadata,
        )

    async def add_memory(
        self,
        *,
        app_name: str,
        user_id: str,
        memories: Sequence[MemoryEntry],
        custom_metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Remember entries for the running user."""
        _, owner = self._owners.current(user_id, "add_memory")
        await self._service.add_memory(
            app_name=app_name, user_id=owner.user, memories=memories, custom_metadata=custom_metadata
        )

    async def search_memory(self, *, app_name: str, user_id: str, query: str) -> SearchMemoryResponse:
        """What the running user's memories have on a query."""
        _, owner = self._owners.current(user_id, "search_memory")
        memories: list[MemoryEntry] = []
        for user in owner.users:
            found = await self._service.search_memory(app_name=app_name, user_id=user, query=query)
            memories += found.memories
        return SearchMemoryResponse(memories=memories)

    async def delete_memory(self, *, app_name: str, user_id: str, memory_id: str | None = None) -> None:
        """Forget one memory of the running user's."""
        _, owner = self._owners.current(user_id, "delete_memory")
        for user in owner.users:
            await self._service.delete_memory(app_name=app_name, user_id=user, memory_id=memory_id)
