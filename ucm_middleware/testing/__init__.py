"""Helpers for tests of applications that use this package. The pytest plugin makes fixtures of them.

Nothing in here needs pytest but what ``--ucm-strict`` adds to it.
"""

from ucm_middleware.testing.clock import FakeClock
from ucm_middleware.testing.closing import closing_contexts
from ucm_middleware.testing.drive import Drive
from ucm_middleware.testing.exchange import Exchange, Response
from ucm_middleware.testing.ledger import RecordingLedger
from ucm_middleware.testing.server import Server, start_server
from ucm_middleware.testing.users import Users
from ucm_middleware.testing.websocket import ConnectionEnded, ConnectionRefused, WebSocket

__all__ = [
    "ConnectionEnded",
    "ConnectionRefused",
    "Drive",
    "Exchange",
    "FakeClock",
    "RecordingLedger",
    "Response",
    "Server",
    "Users",
    "WebSocket",
    "closing_contexts",
    "start_server",
]
