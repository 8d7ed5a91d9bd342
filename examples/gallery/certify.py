"""The users of the gallery, for ``ucm certify``: what they sign in with, and what only they may see.

ucm certify --factory --users examples.gallery.certify:cast examples.gallery.global_cache:planted
"""

from examples.gallery.common import USERS, api_key_of
from ucm_middleware.certify import Cast, Given, User

_TEXT = {"enum": ["Show me my account.", "What do you remember?"]}

ROUTES = (
    Given("/uploads", "POST", media="application/octet-stream"),
    Given("/chat", "POST", body={"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}),
)
"""The routes whose bodies nobody can guess: the gallery's applications have no schema."""


def cast() -> Cast:
    """Alice and bob."""
    users = (User(name, {"Authorization": f"Bearer token-of-{name}"}, (api_key_of(name),)) for name in USERS)
    return Cast(tuple(users), ROUTES)
