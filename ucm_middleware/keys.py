"""Owner-derived keys: what clients call their things, made into keys that no other user's code can name.

A key is ``ucm1_<fingerprint>_<hash>``: 54 characters of ``a-z``, ``0-9`` and ``_`` that begin with a letter, so that it
serves every store as it is (PostgreSQL's identifiers end at 63 bytes, and some stores fold case). The fingerprint tells
which secret it was made under. The hash is HMAC-SHA256 (RFC 2104), cut to 200 bits, of the owner's id, the kind and the
client's id, each as UTF-8 behind its length in four bytes: so no two spellings run together.
"""

import hmac
import logging
import re
from collections.abc import Callable
from typing import Final

from ucm_middleware.errors import CrossUserAccessError, InvalidContextError
from ucm_middleware.ids import validate_id
from ucm_middleware.secret import HOW_TO_MAKE_ONE, SecretRing, lower_base32

logger = logging.getLogger(__name__)

PURPOSE: Final = "owner-derived keys"

_HASH_BYTES: Final = 25  # no padding in base32, and birthday collisions only near 2**100 keys
_KIND: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_KEY: Final = re.compile(r"ucm1_([a-z2-7]{8})_[a-z2-7]{40}")
_FINGERPRINT: Final = slice(5, 13)
_MAX_REPORTED: Final = 16


class OwnerKeys:
    """Derives and checks the keys of one manager. ``deny`` records a denial and makes the error to raise."""

    __slots__ = ("_deny", "_reported", "_secrets")

    def __init__(self, secrets: SecretRing, deny: Callable[[str, str], CrossUserAccessError]) -> None:
        self._secrets = secrets
        self._deny = deny
        self._reported: set[str] = set()

    def candidates(self, owner: str, kind: str, client_id: str) -> tuple[str, ...]:
        """The key under each secret, the current one's first. For ids that are checked.

        Raises ConfigurationError in production when no secret was given.
        """
        self._secrets.require(PURPOSE)
        message = b"".join(map(_with_length, (owner, kind, client_id)))
        return tuple(
            f"ucm1_{secret.fingerprint}_"
            + lower_base32(hmac.digest(secret.subkey(PURPOSE), message, "sha256")[:_HASH_BYTES])
            for secret in self._secrets.all
        )

    def check(self, candidates: tuple[str, ...], kind: str, found: str | None) -> str:
        """Return the first candidate when ``found`` is any of them; else record a denial and raise
        CrossUserAccessError.

        ``found`` is what a stored record says its key is, None when there is no record. A record of another user's and
        no record take the same steps: no branch, comparison or record tells one from the other.
        """
        current = candidates[0]
        # As long as a key, and never one: no id has a NUL in it.
        missing = "\0" + current[1:]
        asked = _checked_found(missing if found is None else found)
        encoded = asked.encode(errors="surrogatepass")
        matches = [hmac.compare_digest(candidate.encode(), encoded) for candidate in candidates]
        if not any(matches):
            self._report_unknown_secret(kind, asked)
            # The key, and not the client's id: it has as much to correlate by, and nothing of what was typed.
            raise self._deny("check_key", f"{kind} {current}")
        return current

    def _report_unknown_secret(self, kind: str, found: str) -> None:
        """Tell the operator, once for each secret, of a key that none of the secrets explains."""
        known = [secret.fingerprint for secret in self._secrets.all]
        fingerprint = found[_FINGERPRINT]
        told_of = {*known, *self._reported}
        if not _KEY.fullmatch(found) or fingerprint in told_of or len(self._reported) >= _MAX_REPORTED:
            return
        self._reported.add(fingerprint)
        logger.error(
            "a stored key of kind %s was made under the secret %s, and known here are only %s: its owner is refused "
            "like everybody else. If the secret was rotated, set UCM_SECRET_PREVIOUS to the earlier one. If none was "
            "set, one was made at each start, and what is stored under it is lost: set UCM_SECRET, and %s",
            kind,
            fingerprint,
            ", ".join(known),
            HOW_TO_MAKE_ONE,
        )


def checked_names(kind: object, client_id: object) -> tuple[str, str]:
    """The two as they go into a key. Raises InvalidContextError for a kind that is not one, and for a bad id."""
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise InvalidContextError(
            "kind",
            "is not a lowercase identifier of at most 32 characters (a-z, 0-9 and _, a letter first)",
            "name what the key is for in the code, such as 'thread'",
        )
    return str.__str__(kind), validate_id(client_id, "client_id")


def _with_length(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "big") + encoded


def _checked_found(found: object) -> str:
    if not isinstance(found, str):
        raise InvalidContextError(
            "found",
            f"is not text but {type(found).__name__}",
            "give the key of the stored record, or None for no record",
        )
    return found
