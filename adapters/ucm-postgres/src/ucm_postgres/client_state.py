"""What a driver's connection holds on this side of the line, where no reset by SQL reaches it.

Left there, a user's handlers and loaders would see the next user's rows, and the next user a user's notifications.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

Restore = Callable[[], None]
"""Gives a connection what it held when it was remembered. Raises ClientStateError when it must be closed instead."""

_OF_PSYCOPG: Final = ("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max")
_MODES: Final = ("isolation_level", "read_only", "deferrable")


class ClientStateError(Exception):
    """A connection holds something of a borrower's that cannot be taken from it."""


def remember_psycopg(connection: Any) -> Restore:
    """Remember what psycopg's connection holds, for when its borrower gives it back.

    Call it when the transaction has begun: what notifications came before are dropped.
    """
    drop_notifications(connection)
    pgconn = connection.pgconn
    settings = [(connection, name, getattr(connection, name)) for name in _OF_PSYCOPG]
    settings += [(pgconn, name, getattr(pgconn, name)) for name in ("notice_handler", "notify_handler")]
    handlers = [(each, each[:]) for each in (connection._notice_handlers, connection._notify_handlers)]
    if (adapters := connection._adapters) is not None:
        connection._adapters = type(adapters)(adapters)  # a copy, which copies no more than what is changed
    modes = [getattr(connection, name) for name in _MODES]

    def restore() -> None:
        if [getattr(connection, name) for name in _MODES] != modes:
            raise ClientStateError("how transactions begin was set on the connection, after its own had ended")
        for holder, name, value in settings:
            setattr(holder, name, value)
        for each, before in handlers:
            each[:] = before
        connection._adapters = adapters

    return restore


def drop_notifications(connection: Any) -> None:
    """Drop what psycopg keeps for ``notifies()``. Outside of a transaction, after UNLISTEN, nothing more comes."""
    connection._notifies_backlog = deque()


def remember_asyncpg(connection: Any) -> Restore:
    """Remember what asyncpg's connection holds, for when its borrower gives it back.

    asyncpg does not tell which codecs are set. For types of PostgreSQL's own they can be compared; for others it shows
    in the question about the type that asyncpg asks the server first.
    """
    # Not above, since who has psycopg may have no asyncpg.
    from asyncpg.introspection import TYPE_BY_NAME  # type: ignore[import-untyped]

    channels = connection._listeners
    channels_before = {channel: set(callbacks) for channel, callbacks in channels.items()}
    callbacks = (connection._query_loggers, connection._log_listeners, connection._termination_listeners)
    callbacks_before = [set(each) for each in callbacks]
    settings = connection._protocol.get_settings()
    codecs_before = _codecs(settings)
    asked: list[str] = []

    def look(query: Any) -> None:
        if query.query == TYPE_BY_NAME:
            asked.append(query.query)

    def restore() -> None:
        channels.clear()
        channels.update(channels_before)
        for each, before in zip(callbacks, callbacks_before, strict=True):
            each.clear()
            each.update(before)
        if asked or _codecs(settings) != codecs_before:
            raise ClientStateError("a type codec was set on the connection, and asyncpg takes none back")

    connection.add_query_logger(look)
    return restore


def _codecs(settings: Any) -> list[object]:
    from asyncpg.protocol.protocol import BUILTIN_TYPE_NAME_MAP  # type: ignore[import-untyped]

    return [*map(settings.get_data_codec, BUILTIN_TYPE_NAME_MAP.values())]
