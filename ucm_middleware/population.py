"""One of the two kinds of live contexts, as the registry counts them: the named ones, or the anonymous ones."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.expiry import Deadlines, Timed, front


class Place(Timed):
    """A place in a queue of deadlines that nobody has taken yet: a deadline, its clock, and when to look at it."""

    __slots__ = ("clock", "given", "queue")

    clock: Callable[[], float] | None
    given: float | None  # the deadline without credentials that end
    queue: dict[Timed, UserExecutionContext]


class Population:
    """The named contexts, or the anonymous ones: who stands alone, how many there may be, and until when.

    A context stands alone that is its owner's only one, under one key: the pair, which ``registry_keys`` then leaves
    out, or, of a named one, its owner's id. All that do have the same time to live, ``ttl``, from the moment they came
    in. So ``lone``, being in order, is the table of them and the queue of their deadlines at once. Another time can
    take over whenever it is empty.
    """

    __slots__ = ("deadlines", "limit", "lone", "room", "ttl")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.room = limit  # for how many more; counted by hand, since what looks at it may call nothing
        self.ttl: float | None = None
        self.lone: dict[str, UserExecutionContext] = {}
        self.deadlines = Deadlines[UserExecutionContext]()  # of the others

    @property
    def live(self) -> int:
        return self.limit - self.room

    def place_for(self, deadline: float, now: float, clock: Callable[[], float] | None) -> Place:
        """Where a deadline will wait."""
        place = Place()
        place.deadline = deadline
        place.clock = clock
        place.given = deadline
        place.queue = self.deadlines.queue_for(place, now, deadline - now)
        return place

    def next_wake(self) -> float | None:
        """When the next deadline must be looked at."""
        wakes = [self.deadlines.next_wake()]
        wakes += [self.lone[owner]._lifetime.deadline for owner in front(self.lone, 1) if owner in self.lone]
        return min((wake for wake in wakes if wake is not None), default=None)
