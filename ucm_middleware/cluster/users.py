"""Where users stand in the store: by a keyed hash of the id, under the secret whose seal stands there."""

import hmac
from typing import Final

from ucm_middleware.cluster.store import BUCKETS, UserKey
from ucm_middleware.secret import SecretRing, lower_base32

DIGEST_LENGTH: Final = 26
"""Characters of a user's digest: 130 bits."""


class Users:
    """Keys of users, and the seals that tell this application's secrets from another's.

    During a rotation workers have different current secrets. All of them go by the one whose seal stands in the store.
    Nothing is cached: a key takes three microseconds, and a cache would keep ids.
    """

    __slots__ = ("_subkeys", "seal", "seals")

    def __init__(self, secrets: SecretRing, application: str) -> None:
        self._subkeys = tuple(secret.subkey("cluster users") for secret in secrets.all)
        self.seals = tuple(
            lower_base32(hmac.digest(secret.subkey("cluster seal"), application.encode(), "sha256")[:20])
            for secret in secrets.all
        )
        self.seal = 0
        """Which of the secrets holds, newest first."""

    def key_of(self, user_id: str) -> UserKey:
        """Where a user stands."""
        found = hmac.digest(self._subkeys[self.seal], user_id.encode(), "sha256")
        return UserKey(found[31] % BUCKETS, lower_base32(found[:20])[:DIGEST_LENGTH])
