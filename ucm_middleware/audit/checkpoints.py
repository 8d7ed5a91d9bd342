"""Makes checkpoints: signed notes (C2SP tlog-checkpoint, signed-note) that a ledger is held against later."""

import os
from base64 import b64encode
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucm_middleware.audit.verification.files import check_regular_file, read_small_file
from ucm_middleware.errors import LedgerFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAX_KEY_BYTES: Final = 64 * 1024
_ED25519: Final = b"\x01"


def sign_checkpoint(stream: str, size: int, root: bytes, key: "Ed25519PrivateKey") -> str:
    """The note that says that the first ``size`` records of ``stream`` have this Merkle root, 32 bytes."""
    text = f"{stream}\n{size}\n{b64encode(root).decode()}\n"
    key_id = sha256(stream.encode() + b"\n" + _ED25519 + key.public_key().public_bytes_raw()).digest()[:4]
    signature = b64encode(key_id + key.sign(text.encode())).decode()
    return f"{text}\n\N{EM DASH} {stream} {signature}\n"


def append_checkpoint(path: Path, note: str) -> None:
    """Put a note at the end of a file, which is made if it is not there, and on the disk. Raises LedgerFileError."""
    remedy = "give a file that can be"
    if os.path.exists(path):
        check_regular_file(path, remedy)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            data = (("\n" if size else "") + note).encode()
            if os.write(descriptor, data) != len(data):  # at once, so that no reader sees a half
                os.ftruncate(descriptor, size)
                raise OSError("there is no room for it")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(path)
    except (OSError, ValueError) as error:
        raise LedgerFileError(str(path), f"cannot be written to: {error}", remedy) from None


def generate_key(path: Path) -> Path:
    """Write a new private key (PKCS8, PEM, readable by the owner alone) and beside it its public half (``.pub``), whose
    path is returned. Raises LedgerFileError where either cannot be written, or is there already.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    public_path = path.with_name(f"{path.name}.pub")
    _write_new(path, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        _write_new(public_path, 0o644, public)
    except LedgerFileError:
        path.unlink()
        raise
    return public_path


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """The key in a PEM file (PKCS8, without a passphrase). Raises LedgerFileError when that is not what it is."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    remedy = "give the private key that `ucm audit keygen` wrote"
    pem = read_small_file(path, _MAX_KEY_BYTES, remedy)
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise LedgerFileError(str(path), "is a private key under a passphrase", "give one without") from None
    except (ValueError, UnsupportedAlgorithm):
        raise LedgerFileError(str(path), "is not a private key in PEM", remedy) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerFileError(str(path), "is a private key, but not one of Ed25519", remedy)
    return key


def _write_new(path: Path, mode: int, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise LedgerFileError(str(path), "is there already, and is not overwritten", "choose another name") from None
    except (OSError, ValueError) as error:
        raise LedgerFileError(str(path), f"cannot be written: {error}", "choose another place") from None
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # where a folder cannot be opened, as on Windows, there is nothing to do
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
