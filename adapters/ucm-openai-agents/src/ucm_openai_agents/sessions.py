"""Sessions of one user: what a client calls its conversation becomes a key that nobody else's code can name."""

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, TypeGuard, TypeVar, cast
from weakref import WeakValueDictionary

from agents import SessionABC, SessionSettings, TResponseInputItem
from agents.memory import Session

from ucm_middleware import ConfigurationError, CrossUserAccessError, UserExecutionContext, current_context

KIND: Final = "openai_agents_session"
"""The kind of key that sessions are stored under."""

AnySession = Session | SessionABC
"""Some sessions of the SDK's fit its protocol by inheritance alone, for type checkers."""

S = TypeVar("S", bound=AnySession)


class OwnedSessions(Generic[S]):
    """Opens sessions of the running user's alone, on any store: ``make`` gets the key and returns the SDK's session.

    ``OwnedSessions(lambda key: SQLAlchemySession(key, engine=engine))``. ``make`` is called each time and makes a new
    object; with ``close``, which is the default, it is closed together with the context that it was opened in.
    """

    def __init__(self, make: Callable[[str], S], *, close: bool = True) -> None:
        if not callable(make):
            raise ConfigurationError(
                f"sessions must be a function from a key to a session, not a {type(make).__name__}; give one, such as "
                "lambda key: SQLiteSession(key, 'conversations.db')"
            )
        self._make = make
        self._close = close
        self._moving: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    async def open(self, session_id: str, context: UserExecutionContext | None = None) -> S:
        """What this user's client calls ``session_id``, as an owned handle, for ``Runner.run(session=...)``.

        It passes for what ``make`` returns, and works for this user's code until the context closes. ``context`` is the
        running one when not given. What stands under a previous secret is moved to the key of the current one.

        Raises ContextNotFoundError outside of a context, ContextClosedError in code that outlived its own,
        InvalidContextError for a bad id, CrossUserAccessError for another user's context, and ConfigurationError where
        ``make`` does not use its key, and in production without a secret.
        """
        context = current_context() if context is None else context
        current, *previous = context.candidate_keys(KIND, session_id)
        session = self._made(context, session_id, current)
        for key in previous:
            await self._move(context, session_id, key, session)
        return context.own(session, name="session")

    def of_each_user(self, session_id: str) -> Session:
        """One for each user under the same name, for where one object serves all: ``agent.as_tool(session=...)``."""
        owned: Any = OwnedSession(self, session_id)  # whose session_id is none that anybody may set
        return cast("Session", owned)

    def _made(self, context: UserExecutionContext, session_id: str, key: str) -> S:
        session = self._make(key)
        for layer in _layers(session):
            found = _session_id_of(layer)
            try:
                context.check_key(KIND, session_id, found)
            except CrossUserAccessError as denied:
                raise _not_its_key(session) from denied
            if found != key:  # the one under another secret
                raise _not_its_key(session)
        closable = (layer for layer in _layers(session) if callable(getattr(layer, "close", None)))
        if self._close and (target := next(closable, None)) is not None:
            context.closing(target, name="session")
        return session

    async def _move(self, context: UserExecutionContext, session_id: str, key: str, session: S) -> None:
        lock = self._moving.setdefault((id(asyncio.get_running_loop()), key), asyncio.Lock())
        async with lock:
            earlier = self._made(context, session_id, key)
            items = await earlier.get_items()
            # Where both have some, another process still writes under the earlier secret: nothing is overwritten.
            if items and not await session.get_items(1):
                await session.add_items(items)
                await earlier.clear_session()


class OwnedSession(SessionABC):
    """A session that is the running user's own in each operation; ``OwnedSessions.of_each_user`` makes it.

    Operations raise as ``OwnedSessions.open`` does: in no user's context there is no session.
    """

    session_settings: SessionSettings | None = None

    def __init__(self, sessions: OwnedSessions[Any], session_id: str) -> None:
        self._sessions = sessions
        self._name = session_id
        # Until the context closes: the handle holds it, so a weak dictionary would hold both.
        self._opened: dict[UserExecutionContext, AnySession] = {}

    @property
    def session_id(self) -> str:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """The key under which it is stored for the running user."""
        return current_context().derive_key(KIND, self._name)

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        return await (await self._current()).get_items(limit)

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        await (await self._current()).add_items(items)

    async def pop_item(self) -> TResponseInputItem | None:
        return await (await self._current()).pop_item()

    async def clear_session(self) -> None:
        await (await self._current()).clear_session()

    async def _current(self) -> AnySession:
        context = current_context()
        session = self._opened.get(context)
        if session is None:
            session = await self._sessions.open(self._name, context)
            context.callback(self._opened.pop, context, None)
            self._opened[context] = session
        return session


def sessions_of(given: OwnedSessions[Any] | Callable[[str], AnySession] | None) -> OwnedSessions[Any] | None:
    """What a plugin was given as ``sessions``. Raises ConfigurationError for what is none."""
    return given if given is None or _are_owned(given) else OwnedSessions(cast("Callable[[str], AnySession]", given))


def _are_owned(given: object) -> TypeGuard[OwnedSessions[Any]]:
    return isinstance(given, OwnedSessions)


def _layers(session: object) -> Generator[object]:
    """A session, and the one that it wraps, where it encrypts or compacts."""
    layer: object | None = session
    while layer is not None:
        yield layer
        layer = getattr(layer, "underlying_session", None)


def _session_id_of(session: object) -> str | None:
    try:
        found = getattr(session, "session_id", None)
    except ValueError:  # of a conversation on OpenAI's server that has not begun
        return None
    return found if isinstance(found, str) else None


def _not_its_key(session: object) -> ConfigurationError:
    return ConfigurationError(
        f"the session that was made, a {type(session).__name__}, does not use the key that it was given as its "
        "session_id, and would be somebody else's: hand the key on, as in lambda key: SQLiteSession(key, path). "
        "Conversations whose ids a server makes are not served"
    )
