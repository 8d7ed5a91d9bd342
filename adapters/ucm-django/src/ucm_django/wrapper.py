"""BoundToUser: what makes a backend of Django's for PostgreSQL one whose transactions are tied to users."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.db.backends.postgresql import base
from django.db.backends.utils import CursorDebugWrapper, CursorWrapper

from ucm_django.binder import Binder
from ucm_django.reset import reset_connection
from ucm_django.threads import close_with_thread, forget
from ucm_postgres.blocks import outcome_is_unknown

if TYPE_CHECKING:
    _Cursor = CursorWrapper

    class _Backend(base.DatabaseWrapper):
        # What the stubs leave out.
        def _configure_connection(self, connection: Any) -> bool: ...
        def _close(self) -> None: ...
        def _commit(self) -> None: ...
        def _rollback(self) -> None: ...
        def _savepoint(self, sid: str) -> None: ...
        def _savepoint_rollback(self, sid: str) -> None: ...
        def _savepoint_commit(self, sid: str) -> None: ...
else:
    _Backend = _Cursor = object


class BoundCursor(_Cursor):
    """A cursor of Django's that hands nothing to the driver untied."""

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        return self.db.binder.call(self.cursor, lambda: super(BoundCursor, self).callproc(*args, **kwargs))

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        self.db.binder.tie(self.cursor, "copy")
        return self.cursor.copy(*args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        self.db.binder.tie(self.cursor, "stream")
        return self.cursor.stream(*args, **kwargs)

    def close(self) -> None:
        # On a connection that somebody else has now, there is nothing of ours to close.
        if self.db.binder.is_own(self.cursor):
            self.cursor.close()

    def __getattr__(self, name: str) -> Any:
        self.db.binder.require_reader(self.cursor)
        return super().__getattr__(name)

    def __iter__(self) -> Any:
        self.db.binder.require_reader(self.cursor)
        return super().__iter__()


class _BoundCursorWrapper(BoundCursor, CursorWrapper):
    pass


class _BoundCursorDebugWrapper(BoundCursor, base.CursorDebugWrapper):
    pass


class BoundToUser(_Backend):
    """Mix it into a backend for PostgreSQL, in front: ``class DatabaseWrapper(BoundToUser, postgis.DatabaseWrapper)``.

    Raises ImproperlyConfigured with psycopg 2.
    """

    def __init__(self, settings_dict: dict[str, Any], alias: str = DEFAULT_DB_ALIAS) -> None:
        if base.psycopg_version() < (3,):
            raise ImproperlyConfigured("ucm-django needs psycopg 3: install psycopg[binary,pool]")
        super().__init__(settings_dict, alias)
        self.binder = Binder(self)
        self.execute_wrappers.append(self.binder.execute)  # the outermost: what others add runs inside of it
        self._reset_at_return()
        self.features.empty_fetchmany_value = []  # Django's own is one list, in all iterators of all users

    def _reset_at_return(self) -> None:
        """Have Django's pool reset connections that come back, after what the project itself wants done then."""
        options = self.settings_dict["OPTIONS"]
        pool: Any = options.get("pool")
        if not pool:
            return
        given: dict[str, Any] = {} if pool is True else dict(pool)
        own: Callable[[Any], object] | None = given.get("reset")

        def reset(connection: Any) -> None:
            if own is not None:
                own(connection)
            reset_connection(connection, self.configure)

        self.settings_dict = {**self.settings_dict, "OPTIONS": {**options, "pool": {**given, "reset": reset}}}

    def configure(self, connection: Any) -> object:
        """Set on the driver's connection what Django wants there: the time zone, and the role of ``assume_role``."""
        return self._configure_connection(connection)

    # Connections.

    def connect(self) -> None:
        self.binder.connected()
        super().connect()
        close_with_thread(self)

    def _close(self) -> None:
        forget(self)
        try:
            super()._close()
        finally:
            self.binder.ended(rolled_back=True)

    # Transactions.

    def _commit(self) -> None:
        refusal = self.binder.refusal_to_commit()
        if refusal is not None:  # such as for whoever still runs in an ended context, and changes nothing any more
            super()._rollback()
            self.binder.ended(refusal)
            raise refusal
        try:
            super()._commit()
        except BaseException as error:
            self.binder.ended(error, is_unknown=outcome_is_unknown(error.__cause__ or error))
            raise
        self.binder.ended()

    def _rollback(self) -> None:
        try:
            super()._rollback()
        finally:
            # What atomic() rolls back for is being handled.
            self.binder.ended(sys.exception(), rolled_back=True)

    def _savepoint(self, sid: str) -> None:
        with self._housekeeping():
            super()._savepoint(sid)

    def _savepoint_rollback(self, sid: str) -> None:
        with self._housekeeping():
            super()._savepoint_rollback(sid)

    def _savepoint_commit(self, sid: str) -> None:
        with self._housekeeping():
            super()._savepoint_commit(sid)

    def check_constraints(self, table_names: Any = None) -> None:
        with self._housekeeping():
            super().check_constraints(table_names)

    @contextmanager
    def _housekeeping(self) -> Generator[None]:
        self.binder.is_housekeeping = True
        try:
            yield
        finally:
            self.binder.is_housekeeping = False

    # Cursors.

    def make_cursor(self, cursor: Any) -> CursorWrapper:
        return _BoundCursorWrapper(cursor, self)

    def make_debug_cursor(self, cursor: Any) -> CursorDebugWrapper:
        return _BoundCursorDebugWrapper(cursor, self)
