"""The statements that run for a context, to be cancelled on the server when it is cut off.

A thread cannot be stopped, and neither can the statement that it waits for; the server can be asked to give it up. The
thread then goes on with an error, as if the statement had failed.
"""

import logging
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import psycopg

from ucm_middleware import UserExecutionContext

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT: Final = 5.0
"""How long the server may take to be told, in seconds."""


class Running:
    """Those of one context, each by the driver's connection that it runs on."""

    __slots__ = ("_connections", "_lock", "is_watched")

    def __init__(self) -> None:
        self.is_watched = False
        """Whether the context's teardown knows of them."""
        self._connections: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def noted(self, connection: Any) -> Generator[None]:
        """Around one statement."""
        self._connections.append(connection)
        try:
            yield
        finally:
            # Not while the server is being told: what it is told must not meet what the connection does next, perhaps
            # for somebody else.
            with self._lock:
                self._connections.remove(connection)

    def cancel(self) -> None:
        """Cancel them; waits until the server has been told."""
        with self._lock:
            for connection in tuple(self._connections):
                try:
                    connection.cancel_safe(timeout=CANCEL_TIMEOUT)
                except psycopg.Error:
                    logger.warning("a statement of a request that was cut off could not be cancelled", exc_info=True)

    def end(self) -> None:
        """The context has closed: nothing is to run any more. Does not wait."""
        if self._connections:
            threading.Thread(target=self.cancel, name="ucm_django cancel", daemon=True).start()


_running: WeakKeyDictionary[UserExecutionContext, Running] = WeakKeyDictionary()
_changing = threading.Lock()


def running_of(context: UserExecutionContext) -> Running | None:
    """What runs for the context; None where nothing has."""
    return _running.get(context)


def noted(context: UserExecutionContext, user_id: str | None, connection: Any) -> AbstractContextManager[None]:
    """Around a statement that runs for the context. Raises ContextClosedError when that has closed meanwhile."""
    running = _running.get(context)
    if running is None:
        with _changing:
            running = _running.setdefault(context, Running())
    if user_id is not None and not running.is_watched:
        running.is_watched = True
        context.callback(running.end)  # a context that has no user yet cannot get one after that
    return running.noted(connection)
