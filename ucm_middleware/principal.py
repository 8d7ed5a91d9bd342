"""Who a request comes from, as the application's own authentication says."""

import time
from dataclasses import dataclass
from datetime import datetime

from ucm_middleware.errors import InvalidContextError, UnauthenticatedError
from ucm_middleware.expiry import LONGEST_TTL
from ucm_middleware.ids import validate_id


@dataclass(frozen=True, slots=True)
class Principal:
    """A user, and until when the credentials hold: an aware datetime, None for no end.

    Raises InvalidContextError when the id breaks a rule, and for what is no datetime or a naive one.
    """

    user_id: str
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "user_id", validate_id(self.user_id, "user_id"))
        if self.expires_at is None:
            return
        if not isinstance(self.expires_at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance] - a claim is a number
            rule = f"is not a datetime but {type(self.expires_at).__name__}"
            raise InvalidContextError(
                "expires_at", rule, "give an aware datetime, such as datetime.fromtimestamp(exp, UTC)"
            )
        if self.expires_at.tzinfo is None:
            raise InvalidContextError(
                "expires_at", "has no time zone", "give an aware datetime, such as datetime.now(UTC)"
            )

    def seconds_left(self) -> float | None:
        """How long the credentials hold from now, a year at most; None for no end.

        Raises UnauthenticatedError when they have expired.
        """
        if self.expires_at is None:
            return None
        left = self.expires_at.timestamp() - time.time()
        if left <= 0:
            raise UnauthenticatedError("the credentials have expired")
        return min(left, LONGEST_TTL)
