"""Connections that a thread leaves open when it ends.

Under ASGI each request has a thread of its own for its synchronous code. Django gives its connections back when the
request has been answered; when it was cut off, nobody does, and a pool would miss the connection for ever.
"""

import logging
import sys
import threading
from typing import Protocol

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """A DatabaseWrapper."""

    def close(self) -> None: ...


class _Keeper:
    """Dies with the thread that it was made in, on that thread, and closes what was left open there."""

    __slots__ = ("_wrapper",)

    def __init__(self, wrapper: Closable) -> None:
        self._wrapper: Closable | None = wrapper

    def forget(self) -> None:
        self._wrapper = None

    def __del__(self) -> None:
        if self._wrapper is None or sys.is_finalizing():
            return
        try:
            self._wrapper.close()
        except Exception:
            logger.exception("a connection that a thread left open could not be closed")


class _Here(threading.local):
    def __init__(self) -> None:
        self.keepers: dict[int, _Keeper] = {}


_here = _Here()


def close_with_thread(wrapper: Closable) -> None:
    """Close the connection of this thread when the thread ends, unless ``forget`` comes first."""
    _here.keepers[id(wrapper)] = _Keeper(wrapper)


def forget(wrapper: Closable) -> None:
    """The connection is closed already."""
    keeper = _here.keepers.pop(id(wrapper), None)
    if keeper is not None:
        keeper.forget()
