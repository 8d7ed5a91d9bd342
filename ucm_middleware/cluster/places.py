"""How far a connection is in its user's events, and what it is owed of those that the store has kept."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final

from ucm_middleware.cluster.store import Place
from ucm_middleware.events.channel import LastEvent

MOST: Final = 10**15
"""No sequence is higher; what a client claims may be."""

MOST_EPOCH: Final = 18
"""Characters of an epoch, which are letters and digits: others a client could not name."""


def is_place(place: Place) -> bool:
    """Whether this can stand in an event."""
    epoch = place.epoch
    return epoch.isascii() and epoch.isalnum() and len(epoch) <= MOST_EPOCH and 0 <= place.sequence < MOST


@dataclass(slots=True, eq=False)
class Cursor:
    """The last event that a connection has got, or that was not for it.

    Without an epoch, at 0, it is before the first of whichever there is. A ``sequence`` of None is unknown. With
    ``is_claim`` it is the client that says so. Once ``is_settled``, the connection has all up to here.
    """

    epoch: str | None
    sequence: int | None
    is_claim: bool = False
    is_settled: bool = False

    @property
    def last(self) -> LastEvent:
        """As it is told to the client."""
        return LastEvent(self.epoch, self.sequence)

    def precedes(self, place: Place) -> bool:
        """Whether the event there is the next one. Never that of an epoch that it has not looked up."""
        return self.is_settled and self.sequence == place.sequence - 1 and self.epoch == place.epoch

    def has(self, place: Place) -> bool:
        """Whether the event there is behind it already."""
        return (
            self.is_settled
            and self.epoch == place.epoch
            and self.sequence is not None
            and self.sequence >= place.sequence
        )

    def settle(self, newest: Place | None) -> None:
        """All up to there is done with."""
        self.epoch = None if newest is None else newest.epoch
        self.sequence = 0 if newest is None else newest.sequence
        self.is_claim = False
        self.is_settled = True


def owed(cursor: Cursor, newest: Place | None, available: Container[int], kept: Sequence[int]) -> Sequence[int] | None:
    """The sequences of what a connection has not had yet; None when that is unknown, or not all of it is there.

    ``available`` are those that can be delivered, ``kept`` those of them that the store has kept, in order.
    """
    sequence = cursor.sequence
    is_start = cursor.epoch is None and sequence == 0
    if newest is None:  # no event, or all are forgotten
        return () if is_start or (sequence is None and not cursor.is_claim) else None
    if sequence is None:
        return None
    if is_start and cursor.is_claim:
        return kept  # whatever there is
    if not is_start and cursor.epoch != newest.epoch:
        return None
    if sequence > newest.sequence:  # it heard more meanwhile; or there were never so many
        return () if cursor.is_settled else None
    missing = range(sequence + 1, newest.sequence + 1)
    return missing if all(one in available for one in missing) else None
