"""Erasing a user from a sealed ledger: first the record of it, then the keys."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from ucm_middleware.audit.encoding import encode_plain
from ucm_middleware.audit.file import LedgerFile
from ucm_middleware.audit.records import TRUSTED_CODE, AuditRecord
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.errors import InvalidContextError
from ucm_middleware.ids import MAX_LENGTH, validate_id
from ucm_middleware.secret import SecretRing


def erase_user(path: Path, keys: Path, ring: SecretRing, user_id: str, reason: str) -> int:
    """Destroy a user's keys, and those of the anonymous subjects that became this user. Returns how many there were.

    The erasure is on record before anything is destroyed: whatever comes in between, doing it again completes it, and
    at worst it is on record twice. Raises InvalidContextError for a bad id or reason, LedgerFileError, and
    ErasureIncompleteError when the keys are deleted and traces of them are left.
    """
    user_id, reason = validate_id(user_id, "user_id"), checked_reason(reason)
    with (
        closing(LedgerFile.open(path, sealed=True, must_exist=True)) as file,
        closing(Vault.open_existing(keys, file.stream, ring)) as vault,
    ):
        return erase_from(vault, file.append, user_id, reason)


def erase_from(vault: Vault, append: Callable[[list[tuple[bytes, bytes]]], object], user_id: str, reason: str) -> int:
    """The same with a key file and a ledger that are open: ``append`` makes records of it durable."""
    on_record = vault.subjects_of(user_id)
    _put_on_record(append, on_record, reason)
    erased = vault.erase(user_id)  # also when there is none: traces of an earlier attempt may be left
    _put_on_record(append, [subject for subject in erased if subject not in on_record], reason)
    return len(erased)


def checked_reason(reason: object) -> str:
    """The reason as it goes on record. Raises InvalidContextError for what is no text, blank, or too long."""
    if not isinstance(reason, str) or not reason.strip() or len(reason) > MAX_LENGTH:
        rule = f"is not text, blank, or longer than {MAX_LENGTH} characters"
        raise InvalidContextError("reason", rule, "say why, and name nobody: it stays on record in the clear")
    return reason


def _put_on_record(
    append: Callable[[list[tuple[bytes, bytes]]], object], subjects: Sequence[bytes], reason: str
) -> None:
    if not subjects:
        return
    data = (("subjects", [subject.hex() for subject in subjects]),)
    record_id = secrets.randbits(128)
    row = AuditRecord("erased", time.time(), None, TRUSTED_CODE, reason=reason, data=data, record_id=record_id)
    append([encode_plain(row)])
