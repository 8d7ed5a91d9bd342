"""Sealing what is left in the store: it learns nothing, and what was altered or moved there does not open.

Each is bound to its application, its kind and its user, so that what was taken from one user's events and put among
another's is no event, nor in another application with the same secret; and an event is no notice.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from ucm_middleware.audit.sealing import cipher_of, seal, unseal
from ucm_middleware.cluster.store import UserKey
from ucm_middleware.cluster.tally import Tally
from ucm_middleware.secret import Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

logger = logging.getLogger(__name__)

Kind = Literal["event", "notice"]

PURPOSE: Final = "cluster payloads"

# What is sealed goes by the name of secret in every frame that can raise; see secret.py.


class Seals:
    """Seals under one of the application's secrets, and opens what was sealed under any of them.

    ``current`` says which one, newest first: that whose seal stands in the store, so that every worker has it. ``told``
    is called at most once a minute, with how many did not open since.
    """

    __slots__ = ("_application", "_ciphers", "_current", "_secrets", "_unopened")

    def __init__(
        self,
        secrets: Sequence[Secret],
        application: str,
        current: Callable[[], int],
        told: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._secrets = tuple(secrets)
        self._application = application
        self._ciphers: dict[int, AESGCM] = {}
        self._current = current

        def tell(number: int) -> None:
            logger.error(
                "%d payloads from the cluster's store did not open, and were not delivered: they were altered there, "
                "or sealed under a secret that this worker does not have",
                number,
            )
            told(number)

        self._unopened = Tally(tell, clock)

    @property
    def unopened(self) -> int:
        """How many did not open so far."""
        return self._unopened.total

    def seal(self, kind: Kind, user: UserKey, secret: bytes) -> bytes:
        """The sealed bytes: 28 more than what is given."""
        return seal(self._cipher(self._current()), secret, self._bound(kind, user))

    def unseal(self, kind: Kind, user: UserKey, sealed: bytes) -> bytes | None:
        """What was sealed; None, which is counted, for what is none of ours, of another kind or another user's."""
        associated = self._bound(kind, user)
        current = self._current()
        for index in (current, *(other for other in range(len(self._secrets)) if other != current)):
            secret = unseal(self._cipher(index), sealed, associated)
            if secret is not None:
                return secret
        self._unopened.count()
        return None

    def refuse(self) -> None:
        """Count one that opened, and makes no sense all the same."""
        self._unopened.count()

    def _cipher(self, index: int) -> "AESGCM":
        cipher = self._ciphers.get(index)
        if cipher is None:
            cipher = self._ciphers[index] = cipher_of(self._secrets[index].subkey(PURPOSE))
        return cipher

    def _bound(self, kind: Kind, user: UserKey) -> bytes:
        return f"{self._application} {kind} {user.digest}".encode()
