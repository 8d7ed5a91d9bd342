"""What a forked child must make anew: locks that a thread of the parent may have held, and what belongs to the
parent.
"""

import os
import weakref
from collections.abc import Callable


def after_fork_in_child(method: Callable[[], None]) -> None:
    """Call a bound method in each forked child, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def renew() -> None:
        alive = reference()
        if alive is not None:
            alive()

    os.register_at_fork(after_in_child=renew)
