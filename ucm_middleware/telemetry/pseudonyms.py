"""Users as telemetry knows them: a keyed hash, which tells them apart and does not say who they are."""

import hmac
import logging
from typing import Final

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.ids import RESERVED_PREFIX
from ucm_middleware.secret import SecretRing, lower_base32

logger = logging.getLogger(__name__)

PURPOSE: Final = "pseudonym"

_HASH_BYTES: Final = 25  # no padding in base32


class Pseudonyms:
    """Makes ``ucmp1_<fingerprint>_<hash>`` of a user id: HMAC-SHA256, cut to 200 bits, under the current secret."""

    __slots__ = ("_key", "_prefix")

    def __init__(self, secrets: SecretRing) -> None:
        try:
            secrets.require("the pseudonyms of users in spans")
        except ConfigurationError as error:  # a trace is no reason not to serve
            logger.warning("%s. Until then the pseudonyms of each process are its own", error)
        secret = secrets.all[0]
        self._key = secret.subkey(PURPOSE)
        self._prefix = f"ucmp1_{secret.fingerprint}_"

    def of(self, user_id: str | None) -> str | None:
        """The pseudonym, 55 characters of ``a-z``, ``0-9`` and ``_``. None for trusted code and for an anonymous
        context, which is nobody in particular.
        """
        if not user_id or user_id.startswith(RESERVED_PREFIX):
            return None
        return self._prefix + lower_base32(hmac.digest(self._key, user_id.encode(), "sha256")[:_HASH_BYTES])
