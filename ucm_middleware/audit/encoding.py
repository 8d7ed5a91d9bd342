"""A record as the bytes of its body, and back: docs/reference/ledger-format.md."""

import json
import logging
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from json.encoder import encode_basestring_ascii
from typing import Any, Final, Protocol, cast

from ucm_middleware.audit.records import (
    FOR_A_CONNECTION,
    MENTIONING,
    AuditRecord,
    Data,
    Row,
    UserMention,
    without_mentions,
)
from ucm_middleware.ids import core_text

logger = logging.getLogger(__name__)

SUBJECT_LENGTH: Final = 16
NOBODY: Final = bytes(SUBJECT_LENGTH)

LONGEST_BODY: Final = 8 * 1024 * 1024
"""Bytes. What is longer is reduced: a reader may refuse rows of more than 16 MiB, and trails are held in memory."""

_TOKEN: Final = re.compile("[0-9a-f]{32}")
_quoted: Final = encode_basestring_ascii
_to_json: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

_DATA_OF_A_CONNECTION: Final = f',"data":{_to_json(dict(FOR_A_CONNECTION))}'  # the most frequent by far


class Subject(Protocol):
    """A user as a sealed ledger knows them."""

    @property
    def token(self) -> bytes: ...

    def seal(self, plain: bytes, /) -> bytes: ...

    def unseal(self, sealed: bytes, /) -> bytes: ...


Names = Callable[[bytes], str | None]
"""Who is behind a subject; None once that user is erased."""


def plain_token(user_id: str) -> bytes:
    """The subject of a user in a ledger without keys."""
    return sha256(user_id.encode(errors="surrogatepass")).digest()[:SUBJECT_LENGTH]


def encode_plain(row: Row) -> tuple[bytes, bytes]:
    """Subject and body of a record, with users by their ids. It never fails: see ``_reduced``."""
    try:
        return _bounded(_plain(row))
    except Exception as error:  # noqa: BLE001 - whatever is in it: the others must not wait for it for ever
        return _plain(_reduced(row, error))


def encode_sealed(row: Row, subjects: Mapping[str, Subject]) -> tuple[bytes, bytes]:
    """Subject and body of a record, with users by their subjects, and what is personal under the subject's key."""
    try:
        return _bounded(_sealed(row, subjects))
    except Exception as error:  # noqa: BLE001 - likewise
        return _sealed(_reduced(row, error), subjects)


def users_in(row: Row) -> set[str]:
    """Everybody whom a record names."""
    found = {user_id for user_id in (row[2], row[3]) if user_id}
    for name, value in row[11]:
        if name in MENTIONING:
            without_mentions(value, found.add)
    return found


def decode(
    user_id: str | None, subject: Subject | None, body: bytes, name_of: Names = lambda token: None
) -> AuditRecord:
    """The record that a body holds.

    ``subject`` opens what is sealed; without one only what stands in the clear is there. ``name_of`` turns subjects
    into the users that they stand for, and "erased" where there is none any more.
    """
    members: dict[str, Any] = json.loads(body)
    if (sealed := members.pop("sealed", None)) is not None and subject is not None:
        members.update(json.loads(subject.unseal(b64decode(sealed))))
    context = _number(members, "context", "context_")
    data: dict[str, object] = members.get("data", {})
    for name in data.keys() & MENTIONING:
        data[name] = _with_names(data[name], name_of)
    return AuditRecord(
        event=members["event"],
        at=members["at"],
        user_id=members.get("user", user_id),
        actor_id=cast("str | None", _with_names(members.get("actor"), name_of)),
        context=context,
        request=members.get("request", context),
        given_thread_id=members.get("thread"),
        given_run_id=members.get("run"),
        outcome=members["outcome"],
        reason=members.get("reason"),
        seconds=members.get("seconds"),
        data=tuple(data.items()),
        record_id=_number(members, "id") or 0,
        trace_id=_number(members, "trace") or 0,
        span_id=_number(members, "span") or 0,
    )


def _bounded(entry: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    if len(entry[1]) > LONGEST_BODY:
        raise ValueError("the record is too long")
    return entry


def _plain(row: Row) -> tuple[bytes, bytes]:
    user_id, actor_id = row[2], row[3]
    text = _opening(row) if actor_id is None else f'{_opening(row)},"actor":{_quoted(actor_id)}'
    if user_id is None:
        return NOBODY, f"{text},{_members(row, str)}}}".encode("ascii")
    return plain_token(user_id), f'{text},"user":{_quoted(user_id)},{_members(row, str)}}}'.encode("ascii")


def _sealed(row: Row, subjects: Mapping[str, Subject]) -> tuple[bytes, bytes]:
    user_id, actor_id = row[2], row[3]

    def mention(user_id: str) -> dict[str, str]:
        return {"subject": subjects[user_id].token.hex()}

    text = _opening(row)
    if actor_id is not None:
        text = f'{text},"actor":{_to_json(mention(actor_id)) if actor_id else _quoted(actor_id)}'
    members = _members(row, mention)
    if user_id is None:
        return NOBODY, f"{text},{members}}}".encode("ascii")
    subject = subjects[user_id]
    sealed = b64encode(subject.seal(f"{{{members}}}".encode("ascii"))).decode("ascii")
    return subject.token, f'{text},"sealed":"{sealed}"}}'.encode("ascii")


def _opening(row: Row) -> str:
    return f'{{"event":"{row[0]}","at":{row[1]!r},"outcome":"{row[8]}"'


def _members(row: Row, mention: Callable[[str], object]) -> str:
    """What is sealed in a sealed ledger, as the inside of a JSON object. It is never empty: each has an id."""
    _, _, _, _, context, request, thread_id, run_id, _, reason, seconds, data, record_id, trace_id, span_id = row
    text = f'"id":"{record_id.to_bytes(16).hex()}"'  # in half the time of :032x
    if context is not None:
        text += f',"context":"context_{context.to_bytes(16).hex()}"'
    if request != context:  # most requests have the core of their context
        text += f',"request":{_to_json(f"request_{core_text(request)}" if isinstance(request, int) else request)}'
    if thread_id is not None:
        text += f',"thread":{_quoted(thread_id)}'
    if run_id is not None:
        text += f',"run":{_quoted(run_id)}'
    if trace_id:
        text += f',"trace":"{trace_id.to_bytes(16).hex()}","span":"{span_id.to_bytes(8).hex()}"'
    if reason is not None:
        text += f',"reason":{_quoted(reason)}'
    if seconds is not None:
        text += f',"seconds":{seconds!r}'
    if data is FOR_A_CONNECTION:
        text += _DATA_OF_A_CONNECTION
    elif data:
        text += f',"data":{_data(data, mention)}'
    return text


def _reduced(row: Row, error: Exception) -> Row:
    """What can be said of a record with something in it that no record has."""
    logger.error("a record of %s cannot be written as it is (%s), and is reduced", row[0], type(error).__name__)
    return AuditRecord(
        row[0], row[1], row[2], outcome=row[8], reason="reduced: it was not as records are", record_id=row[12]
    )


def _data(data: Data, mention: Callable[[str], object]) -> str:
    try:
        return _to_json(
            {name: without_mentions(value, mention) if name in MENTIONING else value for name, value in data}
        )
    except (TypeError, ValueError, RecursionError) as error:
        # The record must not be lost for it, and what it holds must not be in the log.
        logger.error("the data of a record is not JSON (%s), and was left out", type(error).__name__)
        return _to_json({"left_out": f"not JSON: {type(error).__name__}"})


def _with_names(value: object, name_of: Names) -> object:
    if isinstance(value, list):
        return [_with_names(item, name_of) for item in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    members = cast("dict[str, object]", value)
    if members.keys() == {"subject"} and isinstance(token := members["subject"], str) and _TOKEN.fullmatch(token):
        name = name_of(bytes.fromhex(token))
        return "erased" if name is None else UserMention(name)
    return {name: _with_names(item, name_of) for name, item in members.items()}


def _number(members: Mapping[str, Any], name: str, prefix: str = "") -> int | None:
    text = members.get(name)
    return None if text is None else int(text.removeprefix(prefix), 16)
