"""What wrap_handler can be told."""

from collections.abc import Sequence
from typing import TypedDict

from ucm_middleware.identity import Identify


class Settings(TypedDict, total=False):
    """As ``UserContextMiddleware`` has them, and with the same values where nothing is said."""

    identify: Identify | None
    require_identity: bool
    ttl: float | None
    allowed_origins: Sequence[str]
    max_message_size: int
    message_rate: float | None
    context_per_message: bool
