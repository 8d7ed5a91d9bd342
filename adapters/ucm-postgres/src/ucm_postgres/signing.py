"""The hardened mode: a user id that the database can tell from a forged one.

The value is ``1.FINGERPRINT.ISSUED.MAC.USER``: which key it was signed with, when in seconds since 1970, the
HMAC-SHA256 of all the rest in hex, and the user id. What checks it in the database is made by ``policies.setup_sql``.
"""

import hmac
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from ucm_middleware import ConfigurationError, UserExecutionContext

PURPOSE: Final = "postgres binding"
"""What the application's secret gives a subkey for."""

_BLOCK: Final = 64  # bytes, of SHA-256
_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """A key as the database keeps it: ``fingerprint``, which is public, and the two padded keys of HMAC (RFC 2104).

    With the padded keys, PostgreSQL needs no more than its own sha256() to work out an HMAC.
    """

    fingerprint: str
    inner: bytes
    outer: bytes

    @classmethod
    def from_subkey(cls, secret: bytes) -> "SigningKey":
        """From a subkey of 32 bytes, one of ``manager.subkeys(PURPOSE)``."""
        padded = secret.ljust(_BLOCK, b"\0")
        return cls(_fingerprint(secret), padded.translate(_INNER), padded.translate(_OUTER))

    def __repr__(self) -> str:
        return f"<SigningKey {self.fingerprint}>"


def sign(context: UserExecutionContext) -> str:
    """The signed value for the context's user, issued now, under the current secret of its manager.

    Raises ConfigurationError for a context without a manager.
    """
    host = context.host
    if host is None:
        raise ConfigurationError(
            "the context lives under no manager, which has the secret that user ids are signed with; open it with "
            "manager.create_isolated_context(), or put it under one with manager.set_context()"
        )
    return signed(host.subkeys(PURPOSE)[0], context.user_id, int(time.time()))


def signed(secret: bytes, user_id: str, issued: int) -> str:
    """The value for a user id, under a subkey. ``issued`` is in seconds since 1970."""
    head = f"1.{_fingerprint(secret)}.{issued}."
    mac = hmac.digest(secret, f"{head}{user_id}".encode(), "sha256").hex()
    return f"{head}{mac}.{user_id}"


def _fingerprint(secret: bytes) -> str:
    return sha256(b"fingerprint of " + PURPOSE.encode() + b": " + secret).hexdigest()[:16]
