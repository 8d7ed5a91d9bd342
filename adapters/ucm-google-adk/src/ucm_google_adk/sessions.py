"""OwnedSessionService: the sessions of one user, in any of ADK's session services."""

# Private attributes of a model begin with an underscore.
# pyright: reportPrivateUsage=false

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal
from uuid import uuid4

from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.sessions.base_session_service import (
    BaseSessionService,
    GetSessionConfig,
    ListSessionsResponse,
)
from google.adk.sessions.session import Session
from google.adk.sessions.state import State
from pydantic import PrivateAttr

from ucm_google_adk.errors import SharedStateError
from ucm_google_adk.owners import Moves, Owner, Owners, aligned
from ucm_middleware import ConfigurationError, InvalidContextError, UserExecutionContext

AppState = Literal["refuse", "own"]

CLIENT_ID: Final = "ucm:session_id"
"""Where a stored session keeps what its client calls it; the id it is stored under cannot be read back."""

_WITHOUT_EVENTS: Final = GetSessionConfig(num_recent_events=0)


class OwnedSession(Session):
    """A session as its user sees it: with the ids that the client gave, and the user's own."""

    _stored: Session | None = PrivateAttr(default=None)


class OwnedSessionService(BaseSessionService):
    """Keeps the sessions of each user apart in ``service``, which is any of ADK's and stays the application's to close.

    The user is the one that the running code's context belongs to, whatever ``user_id`` says: another one raises
    CrossUserAccessError, and code in no context ContextNotFoundError. Session ids are the client's outside and
    derived from the owner inside, so that two users' sessions of one name are two, and naming another's finds nothing.
    ``user:`` state is the user's. ``app:`` state is shared by all users in ADK: with ``app_state="refuse"`` writing it
    raises SharedStateError and none is read, with ``"own"`` each user has one of their own.

    Raises ConfigurationError for what is no session service, and for another ``app_state``.
    """

    def __init__(self, service: BaseSessionService, *, app_state: AppState = "refuse") -> None:
        if not isinstance(service, BaseSessionService):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"service is a {type(service).__name__}; give a session service of ADK, such as "
                "InMemorySessionService()"
            )
        if isinstance(service, OwnedSessionService):
            raise ConfigurationError("service keeps its sessions apart already; give the one that it was made with")
        if app_state not in ("refuse", "own"):
            raise ConfigurationError(f"app_state is {app_state!r}; give 'refuse' or 'own'")
        self._service = service
        self._own_apps = app_state == "own"
        self._owners = Owners()
        self._moves = Moves()

    async def create_session(
        self,
        *,
        app_name: str,
        user_id: str,
        state: dict[str, Any] | None = None,
        session_id: str | None = None,
    ) -> Session:
        """Create a session of the running user's. Raises AlreadyExistsError for an id that this user has used."""
        context, owner = self._owners.current(user_id, "create_session")
        client_id = str(uuid4()) if session_id is None else session_id
        names = owner.sessions(context, client_id)
        self._check_state(state or {})
        if len(names) > 1 and await self._find(context, owner, app_name, client_id, _WITHOUT_EVENTS) is not None:
            raise _exists(client_id)
        return await self._create(context, owner, app_name, client_id, state or {})

    async def get_session(
        self, *, app_name: str, user_id: str, session_id: str, config: GetSessionConfig | None = None
    ) -> Session | None:
        """The running user's session of that name, or None."""
        context, owner = self._owners.current(user_id, "get_session")
        found = await self._find(context, owner, app_name, session_id, config)
        return None if found is None else self._outside(context, owner, app_name, session_id, found)

    async def list_sessions(self, *, app_name: str, user_id: str | None = None) -> ListSessionsResponse:
        """The running user's sessions, without events; nobody else's, also where ``user_id`` is None."""
        context, owner = self._owners.current(user_id, "list_sessions")
        listed: dict[str, Session] = {}
        for user, app in aligned(owner.users, self._apps(context, owner, app_name)):
            for each in (await self._service.list_sessions(app_name=app, user_id=user)).sessions:
                client_id = each.state.get(CLIENT_ID) or await self._client_id(app, user, each.id)
                # One that stands under two secrets is in the middle of being moved; the current one's comes first.
                if client_id is not None and client_id not in listed:
                    listed[client_id] = self._outside(context, owner, app_name, client_id, each)
        return ListSessionsResponse(sessions=sorted(listed.values(), key=lambda each: (each.last_update_time, each.id)))

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Delete the running user's session of that name, if there is one."""
        context, owner = self._owners.current(user_id, "delete_session")
        names = owner.sessions(context, session_id)
        for user, app, name in self._places(context, owner, app_name, names):
            await self._service.delete_session(app_name=app, user_id=user, session_id=name)

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        """The running user's state, without the prefix."""
        context, owner = self._owners.current(user_id, "get_user_state")
        merged: dict[str, Any] = {}
        for user, app in reversed(aligned(owner.users, self._apps(context, owner, app_name))):
            merged |= await self._service.get_user_state(app_name=app, user_id=user)
        return merged

    async def append_event(self, session: Session, event: Event) -> Event:
        """Append to the running user's session. Raises CrossUserAccessError for another's, and SharedStateError."""
        context, owner = self._owners.current(session.user_id, "append_event")
        if event.partial:
            return event
        changed = tuple(event.actions.state_delta)
        self._check_state(changed)
        stored = self._inside(context, owner, session)
        # Some services store all of the state again.
        stored.state = {**session.state, CLIENT_ID: session.id}
        try:
            appended = await self._service.append_event(stored, event)
        except SessionNotFoundError:
            raise SessionNotFoundError(f"Session {session.id} not found.") from None
        # No more than that: others may have changed the rest meanwhile.
        session.state.update({key: stored.state[key] for key in changed if key in stored.state})
        if stored.events is not session.events:  # a service of another make
            session.events = stored.events
        session.last_update_time = stored.last_update_time
        return appended

    async def flush(self) -> None:
        """Write what the service holds back."""
        await self._service.flush()

    # Between the two sides.

    def _apps(self, context: UserExecutionContext, owner: Owner, app_name: str) -> tuple[str, ...]:
        """What the app is called inside, under each secret."""
        return owner.apps(context, app_name) if self._own_apps else (app_name,)

    def _places(
        self, context: UserExecutionContext, owner: Owner, app_name: str, names: tuple[str, ...]
    ) -> list[tuple[str, ...]]:
        """User, app and id of a session inside, under each secret."""
        return aligned(owner.users, self._apps(context, owner, app_name), names)

    def _outside(
        self, context: UserExecutionContext, owner: Owner, app_name: str, client_id: str, stored: Session
    ) -> OwnedSession:
        """A stored session as its user sees it, which it is checked to be."""
        owner.check_session(context, client_id, stored.id, stored.user_id)
        hidden = CLIENT_ID if self._own_apps else (CLIENT_ID, State.APP_PREFIX)
        state = {key: value for key, value in stored.state.items() if not key.startswith(hidden)}
        # A copy, since what a service keeps may be this very object; from here on, both stand for one session.
        stored = stored.model_copy()
        session = OwnedSession.model_construct(
            id=client_id,
            app_name=app_name,
            user_id=owner.user_id,
            state=state,
            events=stored.events,
            last_update_time=stored.last_update_time,
        )
        session._stored = stored
        return session

    def _inside(self, context: UserExecutionContext, owner: Owner, session: Session) -> Session:
        """The session as it is stored, over the same events."""
        name = owner.sessions(context, session.id)[0]
        stored = session._stored if isinstance(session, OwnedSession) else None
        if stored is None or stored.id != name or stored.user_id != owner.user:
            stored = Session(id=name, app_name=self._apps(context, owner, session.app_name)[0], user_id=owner.user)
            if isinstance(session, OwnedSession):
                session._stored = stored
        if stored.events is not session.events:
            stored.events = session.events
        if stored.last_update_time != session.last_update_time:
            stored.last_update_time = session.last_update_time
        return stored

    def _check_state(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key.startswith(State.APP_PREFIX) and not self._own_apps:
                raise SharedStateError(key)
            if key == CLIENT_ID:
                raise InvalidContextError(
                    "state", f"has the key {CLIENT_ID}, which is the adapter's", "use another key"
                )

    async def _create(
        self, context: UserExecutionContext, owner: Owner, app_name: str, client_id: str, state: Mapping[str, Any]
    ) -> Session:
        app = self._apps(context, owner, app_name)[0]
        name = owner.sessions(context, client_id)[0]
        inherited = await self._earlier_state(context, owner, app_name)
        try:
            stored = await self._service.create_session(
                app_name=app, user_id=owner.user, state={**inherited, **state, CLIENT_ID: client_id}, session_id=name
            )
        except AlreadyExistsError:
            raise _exists(client_id) from None
        return self._outside(context, owner, app_name, client_id, stored)

    async def _client_id(self, app: str, user: str, name: str) -> str | None:
        """What the client calls a session that a service listed without its state."""
        found = await self._service.get_session(app_name=app, user_id=user, session_id=name, config=_WITHOUT_EVENTS)
        return None if found is None else found.state.get(CLIENT_ID)

    # When the secret changes.

    async def _find(
        self,
        context: UserExecutionContext,
        owner: Owner,
        app_name: str,
        client_id: str,
        config: GetSessionConfig | None,
    ) -> Session | None:
        """The session as it is stored now. One under a previous secret is moved first."""
        current, *earlier = self._places(context, owner, app_name, owner.sessions(context, client_id))
        for user, app, name in earlier:
            async with self._moves.only_one(name):
                old = await self._service.get_session(app_name=app, user_id=user, session_id=name)
                if old is not None:
                    owner.check_session(context, client_id, old.id, old.user_id)
                    await self._move(context, owner, app_name, client_id, old)
        user, app, name = current
        return await self._service.get_session(app_name=app, user_id=user, session_id=name, config=config)

    async def _move(
        self, context: UserExecutionContext, owner: Owner, app_name: str, client_id: str, old: Session
    ) -> None:
        """Store a session under the current secret, and delete it where it was, which comes last: until then, whoever
        loads it goes on with the moving.
        """
        user, app, name = self._places(context, owner, app_name, owner.sessions(context, client_id))[0]
        new = await self._service.get_session(app_name=app, user_id=user, session_id=name)
        if new is None:
            kept = {key: value for key, value in old.state.items() if not _is_shared(key)}
            inherited = await self._earlier_state(context, owner, app_name)
            state = {**inherited, **kept, CLIENT_ID: client_id}
            try:
                new = await self._service.create_session(app_name=app, user_id=user, state=state, session_id=name)
            except AlreadyExistsError:  # by another process
                new = await self._service.get_session(app_name=app, user_id=user, session_id=name)
                if new is None:
                    raise
        there = {event.id for event in new.events}
        for event in old.events:
            if event.id not in there:
                copied = event.model_copy(deep=True)
                # Later sessions may have changed what is the user's.
                copied.actions.state_delta = {
                    key: value for key, value in copied.actions.state_delta.items() if not _is_shared(key)
                }
                await self._service.append_event(new, copied)
        await self._service.delete_session(app_name=old.app_name, user_id=old.user_id, session_id=old.id)

    async def _earlier_state(self, context: UserExecutionContext, owner: Owner, app_name: str) -> dict[str, Any]:
        """What the user has beyond sessions under previous secrets, and not under the current one."""
        places = aligned(owner.users, self._apps(context, owner, app_name))
        if len(places) == 1:
            return {}
        states = [await self._shared_state(app, user) for user, app in places]
        return {key: value for state in reversed(states[1:]) for key, value in state.items() if key not in states[0]}

    async def _shared_state(self, app: str, user: str) -> dict[str, Any]:
        found = await self._service.get_user_state(app_name=app, user_id=user)
        state = {f"{State.USER_PREFIX}{key}": value for key, value in found.items()}
        if self._own_apps:  # which no service gives by itself
            for session in (await self._service.list_sessions(app_name=app, user_id=user)).sessions[-1:]:
                state |= {key: value for key, value in session.state.items() if key.startswith(State.APP_PREFIX)}
        return state


def _is_shared(key: str) -> bool:
    return key.startswith((State.USER_PREFIX, State.APP_PREFIX)) or key == CLIENT_ID


def _exists(client_id: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"Session with id {client_id} already exists.")
