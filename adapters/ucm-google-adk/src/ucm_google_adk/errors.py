"""What the adapter refuses, in words that say what to do."""

from ucm_middleware import UserContextError


class SharedStateError(UserContextError):
    """State under ``app:``, which ADK shares among all users of an app, was to be written. ``key`` is its name."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"the state {key!r} would be shared by all users of the app: keep it under 'user:' or in the session, or "
            "give each user an app state of their own with OwnedSessionService(service, app_state='own')"
        )
        self.key = key
