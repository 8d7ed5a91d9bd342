"""Database: what an application has of it, whichever engines it runs on."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ucm_middleware import ConfigurationError, IsolationLevel, UserExecutionContext, current_context, hookimpl
from ucm_sqlalchemy.ownership import require_user
from ucm_sqlalchemy.sessions import AnyEngine, Sessions
from ucm_sqlalchemy.shared import SHARED
from ucm_sqlalchemy.transaction import SessionTransaction
from ucm_sqlalchemy.transactional import transactional
from ucm_sqlalchemy.units import Place, UnitOfWork

S = TypeVar("S", bound=Session | AsyncSession)
P = ParamSpec("P")
R = TypeVar("R")


class Database(Generic[S]):
    """A plugin: ``UserContextManager(plugins=[database])``. Its sessions are those of the running context's user."""

    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(
        self,
        name: str,
        is_async: bool,
        session_class: type[S],
        session_options: Mapping[str, Any],
        prepare: Callable[[S, str], object] | None = None,
    ) -> None:
        if not name or not name.isprintable():
            raise ConfigurationError("name is empty or not printable; give one for the records, such as orders")
        if issubclass(session_class, AsyncSession) is not is_async:
            wanted = "AsyncSession" if is_async else "Session"
            raise ConfigurationError(f"session_class is {session_class.__qualname__}; give a subclass of {wanted}")
        if "bind" in session_options or "binds" in session_options:
            raise ConfigurationError("session_options has a bind: the sessions are bound to the database's own engine")
        self.name = name
        self.is_async = is_async
        self.place: Place[S] = Place()
        self._sessions: Sessions[S] = Sessions(session_class, session_options, prepare)

    # For the application.

    def session(self) -> S:
        """The session of the running context, as a handle that its user's code alone can use, while it is open.

        One per context, made at the first call; it asks for a connection at its first statement. Whoever wants its work
        kept commits it: what is not committed when the context closes is rolled back. Inside of a unit of work it is
        that one's session.

        It is a dependency of FastAPI's as it stands: ``Depends(database.session)``.

        Raises ContextNotFoundError outside of a context, UnauthenticatedError in an anonymous one, and
        ContextClosedError in code that outlived its own.
        """
        context = require_user(current_context())
        unit = self.place.find(context)
        if unit is not None:
            return unit.handle
        session = self._sessions.own(context, lambda: self._engine(context, None))
        return context.own(session, name=f"session of {self.name}")

    async def current_session(self) -> S:
        """The same, for ``Depends`` in asynchronous applications: FastAPI calls what is not ``async`` in a thread."""
        return self.session()

    def unit_of_work(self, isolation_level: IsolationLevel | None = None) -> UnitOfWork[S]:
        """A block with a session of its own, committed at its end, rolled back by an error; inside of another a
        savepoint. Raises as ``session`` does, on entering.
        """
        return UnitOfWork(self, isolation_level)

    @overload
    def transactional(self, function: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def transactional(
        self, /, *, isolation_level: IsolationLevel | None = None, retries: int = 0
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def transactional(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        isolation_level: IsolationLevel | None = None,
        retries: int = 0,
    ) -> Any:
        """Run a function in a unit of work: ``@database.transactional``, or with arguments. ``session()`` inside of it
        is the unit's. Called inside of another unit it is a savepoint.

        ``retries`` is how often it is called again, in a new transaction, after a serialization failure or a deadlock;
        a savepoint never is, since its whole transaction has failed.

        Raises ConfigurationError for a generator, and for a function that is ``async`` where the engine is not, or the
        other way around.
        """
        if function is not None:
            return transactional(self, function, None, 0)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            return transactional(self, function, isolation_level, retries)

        return decorate

    # The hooks.

    @hookimpl
    def ucm_open_transaction(
        self, context: UserExecutionContext, isolation_level: IsolationLevel | None
    ) -> SessionTransaction[S]:
        require_user(context)
        engine = self._engine(context, isolation_level)
        # Committed once, at its end: what was read stays readable.
        return SessionTransaction(self._sessions.make(context, engine, expire_on_commit=False))

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (Database, *SHARED)

    # For units of work.

    def new_session(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> S:
        """A session of the context that a unit of work closes, or else the teardown."""
        return self._sessions.new(context, self._engine(context, isolation_level))

    def session_ended(self, context: UserExecutionContext, session: S) -> None:
        """A unit of work has closed its session."""
        self._sessions.forget(context, session)

    # What each database adds.

    @abstractmethod
    def _engine(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> AnyEngine:
        """The engine for transactions of a context."""
