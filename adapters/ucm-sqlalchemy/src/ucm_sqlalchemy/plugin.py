"""SQLAlchemy: one engine for all users, on which each transaction is its user's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, overload

from sqlalchemy import Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ucm_middleware import ConfigurationError, IsolationLevel, UserExecutionContext, hookimpl
from ucm_sqlalchemy.criteria import UserOwned, scope_session
from ucm_sqlalchemy.database import Database
from ucm_sqlalchemy.drivers.choice import driver_for
from ucm_sqlalchemy.drivers.driver import Reset
from ucm_sqlalchemy.engines import EngineBinding
from ucm_sqlalchemy.sessions import AnyEngine
from ucm_sqlalchemy.shared import driver_types, owned_types

if TYPE_CHECKING:
    from ucm_postgres import Binding

S = TypeVar("S", bound=Session | AsyncSession)

_TAKEN: Final = "ucm_database"
"""The execution option that says that an engine has its listeners."""


class SQLAlchemy(Database[S]):
    """Ties each transaction on an engine to the user of the context that it is begun in, whoever begins it: sessions of
    the application's own, Core and ``text()`` included. Where there is no user, none begins.

    ``engine`` is the application's, an Engine or an AsyncEngine, on PostgreSQL (psycopg or asyncpg) or SQLite. On
    PostgreSQL ``binding`` is what the database is told, ``ucm_postgres.Binding()`` when not given, and ``reset`` when a
    connection is brought back to a clean state: on its "return" to the pool, or at the "begin" of each transaction,
    for an engine behind PgBouncer in transaction mode. ``session_class`` and ``session_options`` are for the sessions
    that this gives out: SQLModel's classes, ``{"expire_on_commit": False}``. ``owned`` adds criteria to them, for the
    classes that inherit from it: a convenience, and no boundary. ``name`` stands for the database in records.

    Raises ConfigurationError for an engine that cannot be bound.
    """

    @overload
    def __init__(
        self: "SQLAlchemy[AsyncSession]",
        engine: AsyncEngine,
        *,
        binding: "Binding | None" = None,
        reset: Reset = "return",
        name: str = "database",
        session_class: None = None,
        session_options: Mapping[str, Any] | None = None,
        owned: type[UserOwned] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: "SQLAlchemy[Session]",
        engine: Engine,
        *,
        binding: "Binding | None" = None,
        reset: Reset = "return",
        name: str = "database",
        session_class: None = None,
        session_options: Mapping[str, Any] | None = None,
        owned: type[UserOwned] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        engine: AnyEngine,
        *,
        binding: "Binding | None" = None,
        reset: Reset = "return",
        name: str = "database",
        session_class: type[S],
        session_options: Mapping[str, Any] | None = None,
        owned: type[UserOwned] | None = None,
    ) -> None: ...

    def __init__(
        self,
        engine: AnyEngine,
        *,
        binding: "Binding | None" = None,
        reset: Reset = "return",
        name: str = "database",
        session_class: type[Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        owned: type[UserOwned] | None = None,
    ) -> None:
        is_async = isinstance(engine, AsyncEngine)
        prepare = None if owned is None else scope_session(owned)
        default: type[Any] = AsyncSession if is_async else Session
        super().__init__(name, is_async, session_class or default, session_options or {}, prepare)
        self._engines: dict[str | None, AnyEngine] = {None: engine}
        sync_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        _require_bindable(sync_engine)
        self._is_sqlite = sync_engine.dialect.name == "sqlite"
        driver = driver_for(sync_engine, binding, reset)
        self._driver_types = driver_types(sync_engine.dialect)
        self._owned_types = owned_types(sync_engine.dialect)
        sync_engine.update_execution_options(**{_TAKEN: name})
        EngineBinding(sync_engine, driver, name)

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        return (*super().ucm_shared_types(), *self._driver_types)

    @hookimpl
    def ucm_owned_types(self) -> tuple[type, ...]:
        return self._owned_types

    def _engine(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> AnyEngine:
        level = None if self._is_sqlite else isolation_level  # SQLite's transactions are serializable all the same
        engine = self._engines.get(level)
        if engine is None:
            engine = self._engines[level] = self._engines[None].execution_options(isolation_level=level)
        return engine


def _require_bindable(engine: object) -> None:
    if not isinstance(engine, Engine):
        raise ConfigurationError(f"engine is a {type(engine).__qualname__}; give an Engine or an AsyncEngine")
    taken = cast("str | None", engine.get_execution_options().get(_TAKEN))
    if taken is not None:
        raise ConfigurationError(f"the engine is that of the database {taken!r} already; use that one")
    if isinstance(engine, OptionEngine):
        raise ConfigurationError(
            "the engine is made from another by execution_options(), and that one's transactions would stay unbound; "
            "give that one, and derive from it what you like"
        )
    if isinstance(engine.pool, StaticPool | SingletonThreadPool) and engine.dialect.name != "sqlite":
        raise ConfigurationError(
            f"the engine's pool is a {type(engine.pool).__name__}, which gives one connection to several at once; "
            "use another, such as QueuePool"
        )
