"""Agents of Google's ADK that run as one user: an adapter of ucm-middleware."""

from ucm_google_adk.installed import require_adk

require_adk()

from ucm_google_adk.artifacts import OwnedArtifactService  # noqa: E402
from ucm_google_adk.callbacks import UserContextPlugin  # noqa: E402
from ucm_google_adk.errors import SharedStateError  # noqa: E402
from ucm_google_adk.memory import OwnedMemoryService  # noqa: E402
from ucm_google_adk.plugin import Answer, GoogleADK  # noqa: E402
from ucm_google_adk.sessions import OwnedSessionService  # noqa: E402

__all__ = [
    "Answer",
    "GoogleADK",
    "OwnedArtifactService",
    "OwnedMemoryService",
    "OwnedSessionService",
    "SharedStateError",
    "UserContextPlugin",
    "google_adk",
]

google_adk = GoogleADK()
"""What the entry point ``google-adk`` loads: conversations in memory. For other services, give the manager a
``GoogleADK`` of your own.
"""
