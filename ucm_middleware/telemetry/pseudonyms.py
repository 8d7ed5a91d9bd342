"""Users as telemetry knows them: a keyed hash, which tells them apart and does not say who they are."""

import hmac
import logging
from functools import lru_cache, partial
from typing import Final

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.ids import RESERVED_PREFIX
from ucm_middleware.secret import SecretRing, lower_base32

logger = logging.getLogger(__name__)

PURPOSE: Final = "pseudonym"

_HASH_BYTES: Final = 25  # no padding in base32

_REMEMBERED: Final = 1024
"""Users whose pseudonyms are kept: a context has several records."""


class Pseudonyms:
    """Makes ``ucmp1_<fingerprint>_<hash>`` of a user id: HMAC-SHA256, cut to 200 bits, under the current secret."""

    __slots__ = ("_made",)

    def __init__(self, secrets: SecretRing) -> None:
        try:
            secrets.require("the pseudonyms of users in spans")
        except ConfigurationError as error:  # a trace is no reason not to serve
            logger.warning("%s. Until then the pseudonyms of each process are its own", error)
        secret = secrets.all[0]
        made = partial(_make, secret.subkey(PURPOSE), f"ucmp1_{secret.fingerprint}_")
        self._made = lru_cache(_REMEMBERED)(made)

    def of(self, user_id: str | None) -> str | None:
        """The pseudonym, 55 characters of ``a-z``, ``0-9`` and ``_``. None for trusted code and for an anonymous
        context, which is nobody in particular.
        """
        if not user_id or user_id.startswith(RESERVED_PREFIX):
            return None
        return self._made(user_id)


def _make(key: bytes, prefix: str, user_id: str) -> str:
    return prefix + lower_base32(hmac.digest(key, user_id.encode(), "sha256")[:_HASH_BYTES])
