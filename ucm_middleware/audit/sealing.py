"""Sealing: a nonce, and then AES-256-GCM under it."""

from os import urandom
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES: Final = 12

# As in secret.py: what is sealed goes by the name of secret in every frame that can raise, and cryptography is imported
# where it is needed.


def cipher_of(secret: bytes) -> "AESGCM":
    """What seals under a key of 32 bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(secret)


def seal(cipher: "AESGCM", secret: bytes, associated: bytes) -> bytes:
    """The nonce, which is random, and the ciphertext: 28 bytes more than what is sealed."""
    nonce = urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, secret, associated)


def unseal(cipher: "AESGCM", sealed: bytes, associated: bytes) -> bytes | None:
    """What was sealed; None when it was altered, or sealed under another key or with other associated data."""
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):  # the latter where it is too short to have a nonce
        return None
