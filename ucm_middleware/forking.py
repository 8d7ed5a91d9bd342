"""What a forked child must make anew: locks that a thread of the parent may have held, and what belongs to the
parent.
"""

import os
import threading
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """Something that a forked child cannot use as it is."""

    def after_fork(self) -> None:
        """Make it anew, in the child."""
        ...


class Quiet(Renewable, Protocol):
    """Something that must be at rest while this process forks."""

    def before_fork(self) -> None:
        """Come to rest, and stay so until ``after_fork_in_parent``, or ``after_fork`` in the child."""
        ...

    def after_fork_in_parent(self) -> None:
        """Go on."""
        ...


# Handlers of a fork cannot be unregistered, so there is one of a kind, and it asks whoever still lives.
_renewables: WeakSet[Renewable] = WeakSet()
_quiet: WeakSet[Quiet] = WeakSet()
_at_rest: list[Quiet] = []
_forking = threading.Lock()
"""One fork at a time: two would wait for each other, each with half of those that come to rest."""


def renewed_after_fork(renewable: Renewable) -> None:
    """Call ``after_fork`` in each forked child, as long as the object lives."""
    _renewables.add(renewable)


def quiet_during_fork(thing: Quiet) -> None:
    """Have it come to rest before each fork, as long as the object lives, and renew it in the child."""
    _quiet.add(thing)
    renewed_after_fork(thing)


def leave_to_parent(thing: object) -> None:
    """For a child: never finalize what is the parent's, as closing an SQLite connection here could remove the log that
    the parent still writes to. It stays until the process ends."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _come_to_rest() -> None:
    _forking.acquire()
    _at_rest.extend(_quiet)
    for thing in _at_rest:
        thing.before_fork()


def _go_on() -> None:
    for thing in _at_rest:
        thing.after_fork_in_parent()
    _at_rest.clear()
    _forking.release()


def _renew_all() -> None:
    _at_rest.clear()
    _forking.release()
    for renewable in list(_renewables):
        renewable.after_fork()


os.register_at_fork(before=_come_to_rest, after_in_parent=_go_on, after_in_child=_renew_all)
