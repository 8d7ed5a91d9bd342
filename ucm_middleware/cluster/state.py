"""How this worker stands with the store."""

import logging
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

MemberState = Literal["starting", "up", "recovering", "full", "down", "local"]
"""``starting``: it was not asked yet. ``recovering``: the store is new, or has failed over, and grants nothing for a
while. ``full``: it has no memory left, and grants nothing. ``down`` and ``local``: it cannot be asked, or, under the
policy "local", grants nothing yet.
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is measured of a worker. ``silent`` is for how many seconds the store has not answered; None when it never
    did. ``refused`` are contexts that were refused while it could not be asked.
    """

    state: MemberState
    held: int
    lost: int
    refused: int
    renewals: int
    silent: float | None


def tell(state: MemberState, reason: str | None, held: int, lease: float, *, is_local: bool) -> None:
    """Say in the log that it stands so from now on, for who is woken by it. ``reason`` is a word, and what to do."""
    if state == "down":
        logger.critical(
            "the cluster's store cannot be asked (%s): new contexts of users are refused with 503 until it can; the %d "
            "that are live end within %g seconds",
            reason,
            held,
            lease,
        )
    elif state == "local":
        logger.critical(
            "the cluster's store cannot be asked (%s): this worker carries on by itself, with its own limits; %d "
            "contexts of users are live here",
            reason,
            held,
        )
    elif state == "full":
        logger.critical(
            "the cluster's store has no memory left, raise what it may use: until then new contexts of users %s; the "
            "%d that are live here go on",
            "live by this worker's own limits" if is_local else "are refused with 503",
            held,
        )
    elif state == "recovering":
        logger.warning(
            "the cluster's store is new, or has failed over: for up to %g seconds it grants nothing, while workers put "
            "back what they hold; here that is %d contexts of users",
            lease,
            held,
        )
    elif state == "up":
        logger.info("the cluster's store can be asked; %d contexts of users are live here", held)
