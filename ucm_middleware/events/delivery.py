"""What became of an event."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

DropReason = Literal["full", "oldest", "gone", "guarded", "cluster"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """An event that a connection does not get. ``why``: "full", it did not keep up and is closed; "oldest", the event
    made room for a newer one; "gone", the connection ended; "guarded", the egress guard held the event back, which has
    no number of its own then; "cluster", the cluster's store takes none at the moment, or too many wait for it. Where
    it is for none of the connections, wherever they are, ``connection_id`` is empty.
    """

    connection_id: str
    sequence: int
    why: DropReason


class Delivery(NamedTuple):
    """What became of an event by the time of the answer.

    ``delivered`` counts the connections whose server took it, ``queued`` those for which it waits. ``dropped`` names
    what connections lose through it. With ``kept``, it can be replayed for a while to connections that come back.
    ``epoch`` and ``sequence`` are what they name it by.

    With a cluster, nobody waits for the connections of other workers: ``queued`` counts them all, wherever they are.
    What was posted has no place yet: ``epoch`` is empty then, and ``queued`` counts those to this worker.
    """

    epoch: str
    sequence: int
    delivered: int
    queued: int
    dropped: tuple[Dropped, ...]
    kept: bool
