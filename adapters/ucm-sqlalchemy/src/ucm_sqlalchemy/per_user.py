"""SQLitePerUser: a database file for each user, which no other user's transaction can begin on."""

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, overload

from sqlalchemy import URL, Connection, Engine, MetaData, NullPool, create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from ucm_middleware import ConfigurationError, IsolationLevel, UserExecutionContext
from ucm_sqlalchemy.database import Database
from ucm_sqlalchemy.drivers.driver import Settings
from ucm_sqlalchemy.drivers.unbound import Unbound
from ucm_sqlalchemy.engines import EngineBinding
from ucm_sqlalchemy.ownership import require_same_user
from ucm_sqlalchemy.sessions import AnyEngine

S = TypeVar("S", bound=Session | AsyncSession)

KIND: Final = "sqlite_file"
"""What the keys are derived for, that the files are named by."""


class SQLitePerUser(Database[S]):
    """Each user's data in a file of their own, in ``folder``. It is open while a transaction of theirs is.

    The names of the files are keyed hashes, from ``context.derive_key``: they tell nothing of the user, and need the
    same secret after a restart (``UCM_SECRET``). Only the process's own account can read them. A new one is made with
    the tables of ``metadata``. ``most`` is how many engines are kept, those that were used last. ``is_async`` False is
    for applications without asyncio; else it needs ``aiosqlite``.

    Transactions are serializable, whichever isolation level is asked for.
    """

    @overload
    def __init__(
        self: "SQLitePerUser[AsyncSession]",
        folder: str | os.PathLike[str],
        *,
        is_async: Literal[True] = True,
        metadata: MetaData | None = None,
        most: int = 100,
        name: str = "database",
        session_class: None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: "SQLitePerUser[Session]",
        folder: str | os.PathLike[str],
        *,
        is_async: Literal[False],
        metadata: MetaData | None = None,
        most: int = 100,
        name: str = "database",
        session_class: None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        is_async: bool = True,
        metadata: MetaData | None = None,
        most: int = 100,
        name: str = "database",
        session_class: type[S],
        session_options: Mapping[str, Any] | None = None,
    ) -> None: ...

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        is_async: bool = True,
        metadata: MetaData | None = None,
        most: int = 100,
        name: str = "database",
        session_class: type[Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        default: type[Any] = AsyncSession if is_async else Session
        super().__init__(name, is_async, session_class or default, session_options or {})
        if most < 1:
            raise ConfigurationError(f"most is {most!r}; give a number of engines of at least 1")
        self._folder = Path(folder).absolute()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._metadata = metadata
        self._most = most
        self._engines: OrderedDict[str, AnyEngine] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def engines(self) -> int:
        """How many are kept."""
        return len(self._engines)

    def _engine(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> AnyEngine:
        names = [_file_name(key) for key in context.candidate_keys(KIND, self.name)]
        with self._lock:
            name = next((name for name in names if name in self._engines or (self._folder / name).exists()), names[0])
            path = self._folder / name
            if not path.exists():  # SQLite would make it without tables, and readable by others
                self._make(path)
            engine = self._engines.pop(name, None) or self._open(path, context.user_id)
            self._engines[name] = engine
            if len(self._engines) > self._most:
                # Sessions that still use it go on: it holds no connection that they do not hold.
                self._engines.popitem(last=False)
        return engine

    def _open(self, path: Path, user_id: str) -> AnyEngine:
        # Without a pool: what nobody uses is closed.
        if self.is_async:
            engine = create_async_engine(_url("sqlite+aiosqlite", path), poolclass=NullPool)
            _bind(engine.sync_engine, user_id, self.name)
            return engine
        sync_engine = create_engine(_url("sqlite", path), poolclass=NullPool)
        _bind(sync_engine, user_id, self.name)
        return sync_engine

    def _make(self, path: Path) -> None:
        """Make the file whole before it has its name: nobody finds a half-made one."""
        descriptor, new = tempfile.mkstemp(dir=self._folder, prefix="new-")  # readable by the owner alone
        os.close(descriptor)
        try:
            if self._metadata is not None:
                engine = create_engine(_url("sqlite", new), poolclass=NullPool)
                self._metadata.create_all(engine)
            with suppress(FileExistsError):  # another process made it meanwhile
                os.link(new, path)
        finally:
            os.unlink(new)


class _UsersFile(Unbound):
    """A file of one user's, as ``EngineBinding`` asks of a driver."""

    def __init__(self, user_id: str, name: str) -> None:
        self._user_id = user_id
        self._name = name

    def settings(self, context: UserExecutionContext) -> Settings:
        require_same_user(context, self._user_id, f"transaction on {self._name}")
        return ()

    def begin(self, connection: Connection, settings: Settings) -> None:
        connection.exec_driver_sql("BEGIN")

    def has_ended(self, dbapi_connection: Any, mark: object) -> bool | None:
        driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)  # of aiosqlite, or Python's own
        return not driver.in_transaction


def _bind(engine: Engine, user_id: str, name: str) -> None:
    # Python's driver begins transactions late and not for every statement, which breaks savepoints: SQLAlchemy's
    # documentation has this remedy.
    @event.listens_for(engine, "connect")
    def leave_beginning_to_us(dbapi_connection: Any, record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        dbapi_connection.isolation_level = None

    EngineBinding(engine, _UsersFile(user_id, name), name)


def _url(driver: str, path: str | os.PathLike[str]) -> URL:
    # Not as text, in which a ? in the folder's name would end the path: in one file for all users.
    return URL.create(driver, database=os.fspath(path))


def _file_name(key: str) -> str:
    # A plugin's keys may be anything that is printable.
    return f"{sha256(key.encode()).hexdigest()}.sqlite"
