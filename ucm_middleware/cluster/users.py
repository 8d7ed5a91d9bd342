"""Where users stand in the store: by a keyed hash of the id, under the secret whose seal stands there."""

import hmac
from hashlib import blake2b
from typing import Final

from ucm_middleware.cluster.store import BUCKETS, UserKey
from ucm_middleware.secret import SecretRing, lower_base32

_DIGEST_BYTES: Final = 16
"""Of a user's digest; one more says the bucket."""


class Users:
    """Keys of users, and the seals that tell this application's secrets from another's.

    During a rotation workers have different current secrets. All of them go by the one whose seal stands in the store.
    Nothing is cached: that would keep ids.
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
        key = self._subkeys[self.seal]
        found = blake2b(user_id.encode(), key=key, digest_size=_DIGEST_BYTES + 1).digest()
        return UserKey(found[_DIGEST_BYTES] % BUCKETS, found[:_DIGEST_BYTES].hex())
