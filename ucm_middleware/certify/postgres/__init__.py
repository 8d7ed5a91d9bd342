"""Between an application and its PostgreSQL: which session settings are in force when a connection is used again."""

from ucm_middleware.certify.postgres.conversation import Use
from ucm_middleware.certify.postgres.tap import Tap, tap

__all__ = ["Tap", "Use", "tap"]
