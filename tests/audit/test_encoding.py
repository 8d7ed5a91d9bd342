"""Records as bytes, and back."""

import json
import logging
import secrets
from base64 import b64decode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.ledger import row
from ucm_middleware.audit.encoding import (
    LONGEST_BODY,
    NOBODY,
    decode,
    encode_plain,
    encode_sealed,
    plain_token,
    users_in,
)
from ucm_middleware.audit.records import FOR_A_CONNECTION, MENTIONING, TRUSTED_CODE, AuditRecord, UserMention

IDS = st.text(min_size=1, max_size=20).filter(str.isprintable)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MENTIONS = st.builds(UserMention, IDS)


@st.composite
def records(draw: st.DrawFn, user_ids: st.SearchStrategy[str | None]) -> AuditRecord:
    core = st.integers(0, 2**128 - 1)
    context = draw(st.none() | core)
    request = draw(st.none() | IDS | st.just(context))
    data = draw(st.dictionaries(st.text(max_size=8).filter(lambda name: name not in MENTIONING), PLAIN, max_size=3))
    mentions = draw(st.dictionaries(st.sampled_from(sorted(MENTIONING)), MENTIONS | st.lists(MENTIONS), max_size=2))
    return AuditRecord(
        draw(st.sampled_from(["opened", "closed", "denied", "bound"])),
        draw(st.floats(0, 4e9)),
        draw(user_ids),
        draw(st.none() | st.just(TRUSTED_CODE) | IDS),
        context,
        request,
        draw(st.none() | st.text()),
        draw(st.none() | st.text()),
        draw(st.sampled_from(["ok", "denied", "failed"])),
        draw(st.none() | st.text()),
        draw(st.none() | st.floats(0, 1e6)),
        tuple({**data, **mentions}.items()),
        draw(core),
        *draw(st.tuples(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1)) | st.just((0, 0))),
    )


class Disguise:
    """A subject that hides what it is given, as a cipher does, so that tests can see what was sealed."""

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.token = secrets.token_bytes(16)

    def seal(self, plain: bytes, /) -> bytes:
        return bytes(byte ^ 0xAA for byte in plain)

    unseal = seal


@given(records(IDS | st.none()))
def test_a_plain_record_is_read_as_it_was_written(record: AuditRecord) -> None:
    subject, body = encode_plain(record)
    assert subject == (NOBODY if record.user_id is None else plain_token(record.user_id))
    assert decode(record.user_id, None, body) == record
    assert body.isascii()
    assert json.loads(body)["event"] == record.event


@given(records(IDS | st.none()))
def test_a_sealed_record_is_read_as_it_was_written(record: AuditRecord) -> None:
    subjects = {user_id: Disguise(user_id) for user_id in users_in(record)}
    names = {subject.token: user_id for user_id, subject in subjects.items()}
    own = None if record.user_id is None else subjects[record.user_id]
    token, body = encode_sealed(record, subjects)
    assert token == (NOBODY if own is None else own.token)
    assert decode(record.user_id, own, body, names.get) == record


def test_in_a_sealed_record_only_this_stands_in_the_clear() -> None:
    record = row(
        "alice", actor_id="bob", reason="because", seconds=1.5, trace_id=7, span_id=8, given_thread_id="alices-thread",
        data=(("asked_for", UserMention("carol")), ("audit_metadata", {"plan": "gold"})),
    )  # fmt: skip
    subjects = {user_id: Disguise(user_id) for user_id in ("alice", "bob", "carol")}
    _, body = encode_sealed(record, subjects)
    shown = json.loads(body)
    hidden = json.loads(subjects["alice"].unseal(b64decode(shown.pop("sealed"))))
    assert shown == {
        "event": "opened",
        "at": record.at,
        "outcome": "ok",
        "actor": {"subject": subjects["bob"].token.hex()},
    }
    assert hidden.keys() == {"id", "context", "thread", "trace", "span", "reason", "seconds", "data"}
    assert hidden["data"]["asked_for"] == {"subject": subjects["carol"].token.hex()}


def test_a_request_id_is_written_where_it_does_not_follow_from_the_context() -> None:
    own = row("alice")._replace(context=7, request=7)
    assert json.loads(encode_plain(own)[1]).keys() == {"event", "at", "outcome", "user", "id", "context"}
    for request in (8, "given", f"request_{8:032x}", None):
        record = own._replace(request=request)
        assert decode("alice", None, encode_plain(record)[1]).request_id == record.request_id


def test_a_name_that_is_erased_says_so() -> None:
    record = row("alice", data=(("asked_for", UserMention("carol")),))
    subjects = {user_id: Disguise(user_id) for user_id in ("alice", "carol")}
    _, body = encode_sealed(record, subjects)
    assert decode("alice", subjects["alice"], body).data == (("asked_for", "erased"),)


def test_without_its_key_a_record_shows_what_stands_in_the_clear() -> None:
    subjects = {"alice": Disguise("alice")}
    _, body = encode_sealed(row("alice", reason="because"), subjects)
    found = decode(None, None, body)
    assert (found.event, found.at, found.outcome) == ("opened", 1001.0, "ok")
    assert (found.user_id, found.reason, found.context, found.data) == (None, None, None, ())


def test_what_looks_like_a_subject_is_the_applications_own_where_no_user_is_named() -> None:
    forged = {"subject": "00" * 16}
    _, body = encode_plain(row("alice", data=(("audit_metadata", forged),)))
    assert decode("alice", None, body, lambda token: "mallory").data == (("audit_metadata", forged),)


def test_the_usual_data_of_a_connection_is_written_like_any_other() -> None:
    copy = (("source", "connection"), ("isolation_verified", True))
    assert copy is not FOR_A_CONNECTION
    assert encode_plain(row(data=FOR_A_CONNECTION)) == encode_plain(row(data=copy))


@pytest.mark.parametrize("value", [float("nan"), object(), {1: {2, 3}}, {(1, 2): 3}])
def test_data_that_is_not_json_is_left_out_and_the_record_is_kept(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        _, body = encode_plain(row("alice", data=(("secret", value),), reason="kept"))
    found = decode("alice", None, body)
    assert found.reason == "kept"
    assert list(dict(found.data)) == ["left_out"]
    assert "left out" in caplog.text


def test_each_user_that_a_record_names_is_found() -> None:
    record = row(
        "alice", actor_id="bob", data=(("users", [UserMention("carol"), UserMention("dave")]), ("note", "erin"))
    )
    assert users_in(record) == {"alice", "bob", "carol", "dave"}
    assert users_in(row(None, actor_id=TRUSTED_CODE)) == set()


@pytest.mark.parametrize("shaped", [{"subject": "zz"}, {"subject": 5}, {"subject": "00" * 15}, {"subject": None}])
def test_what_only_looks_like_a_mention_is_shown_as_it_is(shaped: dict[str, Any]) -> None:
    _, body = encode_plain(row("alice", data=(("users", shaped),)))
    assert decode("alice", None, body).data == (("users", shaped),)


def test_a_record_that_no_reader_would_take_is_reduced() -> None:
    _, body = encode_plain(row("alice", reason="x" * (LONGEST_BODY + 1)))
    found = decode("alice", None, body)
    assert (found.event, found.reason) == ("opened", "reduced: it was not as records are")
