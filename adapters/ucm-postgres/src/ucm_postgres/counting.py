"""Counting the statements of psycopg's cursors."""

# The base class is known at run time only.
# mypy: disable-error-code="misc, valid-type, no-any-return"
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from typing import Any
from weakref import WeakKeyDictionary

from psycopg import AsyncConnection, Connection

from ucm_middleware import TransactionLog

AnyConnection = AsyncConnection[Any] | Connection[Any]


class StatementCounter:
    """Counts what a connection's cursors run between ``begin`` and ``end``, for the log of a transaction.

    A connection keeps counting cursor factories, made from its own, for as long as it lives.
    """

    def __init__(self) -> None:
        self._logs: WeakKeyDictionary[AnyConnection, TransactionLog] = WeakKeyDictionary()
        self._kinds: dict[type[Any], type[Any]] = {}

    def begin(self, connection: AnyConnection, log: TransactionLog) -> None:
        factories: Any = connection
        factories.cursor_factory = self._counted(factories.cursor_factory)
        factories.server_cursor_factory = self._counted(factories.server_cursor_factory)
        self._logs[connection] = log

    def end(self, connection: AnyConnection) -> None:
        self._logs.pop(connection, None)

    def _count(self, connection: AnyConnection) -> None:
        if (log := self._logs.get(connection)) is not None:
            log.statements += 1

    def _counted(self, kind: type[Any]) -> type[Any]:
        if kind in self._kinds.values():
            return kind
        made = self._kinds.get(kind)
        if made is None:
            made = self._kinds[kind] = _counted(kind, self._count)
        return made


def _counted(kind: Any, count: Any) -> type[Any]:
    class Counted(kind):
        """The methods that run something; plain functions, since what they return is awaited or iterated as it is."""

        def execute(self, *args: Any, **options: Any) -> Any:
            count(self.connection)
            return super().execute(*args, **options)

        def executemany(self, *args: Any, **options: Any) -> Any:
            count(self.connection)
            return super().executemany(*args, **options)

        def stream(self, *args: Any, **options: Any) -> Any:
            count(self.connection)
            return super().stream(*args, **options)

        def copy(self, *args: Any, **options: Any) -> Any:
            count(self.connection)
            return super().copy(*args, **options)

    Counted.__name__ = Counted.__qualname__ = kind.__name__
    return Counted
