"""Reads checkpoints: signed notes (C2SP tlog-checkpoint, signed-note) that say what a ledger once was."""

import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm_middleware.audit.verification.files import read_small_file
from ucm_middleware.errors import LedgerFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_MAX_BYTES: Final = 64 * 1024 * 1024
_KEY_ID: Final = slice(0, 4)
_SIGNATURE: Final = slice(4, 68)
_NOTE: Final = re.compile(
    rb"((stream_[0-9a-f]{32})\n(0|[1-9][0-9]{0,18})\n([A-Za-z0-9+/]{43}=)\n)\n\xe2\x80\x94 \2 ([A-Za-z0-9+/]{91}=)\n"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """That the first ``size`` records of ``stream`` have this Merkle root, 32 bytes. Its signature holds."""

    stream: str
    size: int
    root: bytes


def read_public_key(path: Path) -> "Ed25519PublicKey":
    """The key in a PEM file (SubjectPublicKeyInfo). Raises LedgerFileError when that is not what it is."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    remedy = "give the file that ends with .pub, which `ucm audit keygen` wrote beside the private key"
    pem = read_small_file(path, 64 * 1024, remedy)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise LedgerFileError(str(path), "is not a public key in PEM", remedy) from None
    if not isinstance(key, Ed25519PublicKey):
        raise LedgerFileError(str(path), "is a public key, but not one of Ed25519", remedy)
    return key


def read_checkpoints(path: Path, *keys: "Ed25519PublicKey") -> tuple[Checkpoint, ...]:
    """All checkpoints of a file, in its order. Raises LedgerFileError unless there is at least one, each is in the
    exact form of the format, and each was signed with the private half of one of the keys.
    """
    content = read_small_file(path, _MAX_BYTES, "give the file that `ucm audit checkpoint` writes to")
    if not content:
        raise LedgerFileError(
            str(path), "has no checkpoints, so there is nothing to verify against", "look for the copy that has"
        )
    checkpoints: list[Checkpoint] = []
    position = 0
    while position < len(content):
        if checkpoints:
            position = _after_blank_line(content, position, path)
        note = _NOTE.match(content, position)
        if note is None:
            raise _malformed(content, position, path)
        checkpoints.append(_checked(note, keys, path, len(checkpoints) + 1))
        position = note.end()
    return tuple(checkpoints)


def _checked(note: re.Match[bytes], keys: Sequence["Ed25519PublicKey"], path: Path, number: int) -> Checkpoint:
    signed, stream, size, root, signature = note.groups()
    root_bytes, signature_bytes = b64decode(root), b64decode(signature)
    if b64encode(root_bytes) != root or b64encode(signature_bytes) != signature:
        raise _malformed(note.string, note.start(), path)
    candidates = [key for key in keys if _key_id(stream, key) == signature_bytes[_KEY_ID]]
    if not candidates:
        whose = "this key" if len(keys) == 1 else "any of these keys"
        raise LedgerFileError(
            str(path), f"checkpoint {number} was not signed with {whose}", "give the public key that belongs to it"
        )
    if not any(_holds(key, signature_bytes[_SIGNATURE], signed) for key in candidates):
        raise LedgerFileError(
            str(path),
            f"checkpoint {number} is not what was signed: it was changed or forged",
            "look for an untouched copy",
        )
    return Checkpoint(stream.decode(), int(size), root_bytes)


def _holds(key: "Ed25519PublicKey", signature: bytes, signed: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _key_id(stream: bytes, key: "Ed25519PublicKey") -> bytes:
    return sha256(stream + b"\n\x01" + key.public_bytes_raw()).digest()[_KEY_ID]


def _after_blank_line(content: bytes, position: int, path: Path) -> int:
    if content[position : position + 1] != b"\n":
        raise _malformed(content, position, path)
    return position + 1


def _malformed(content: bytes, position: int, path: Path) -> LedgerFileError:
    line = content.count(b"\n", 0, position) + 1
    return LedgerFileError(
        str(path), f"there is no checkpoint in the right form at line {line}", "look for an untouched copy"
    )
