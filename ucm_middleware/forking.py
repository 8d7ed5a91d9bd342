"""What a forked child must make anew: locks that a thread of the parent may have held, and what belongs to the
parent.
"""

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """Something that a forked child cannot use as it is."""

    def after_fork(self) -> None:
        """Make it anew, in the child."""
        ...


# Handlers of a fork cannot be unregistered, so there is one, and it asks whoever still lives.
_renewables: WeakSet[Renewable] = WeakSet()


def renewed_after_fork(renewable: Renewable) -> None:
    """Call ``after_fork`` in each forked child, as long as the object lives."""
    _renewables.add(renewable)


def leave_to_parent(thing: object) -> None:
    """For a child: never finalize what is the parent's, as closing an SQLite connection here could remove the log that
    the parent still writes to. It stays until the process ends."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _renew_all() -> None:
    for renewable in list(_renewables):
        renewable.after_fork()


os.register_at_fork(after_in_child=_renew_all)
