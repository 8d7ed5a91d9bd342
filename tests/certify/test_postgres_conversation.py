"""The tap's part of ``ucm certify`` that reads no socket: messages cut at any place, and the question in between."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware.certify.postgres.conversation import Conversation, Use
from ucm_middleware.certify.postgres.framing import LOOKED_AT, Cutter, FramingError, Piece, message
from ucm_middleware.certify.postgres.question import Question
from ucm_middleware.certify.postgres.statements import parts_of

READY = message(b"Z", b"I")
DONE = message(b"C", b"SET\0")
NOTIFIED = message(b"A", struct.pack("!I", 1) + b"here\0payload\0")
QUESTION = Question(["app.user_id"]).to_bytes()
ANSWER = b"".join(
    [
        *(message(kind, b"") for kind in (b"3", b"1", b"2")),
        message(b"D", struct.pack("!Hi", 1, 5) + b"alice"),
        *(message(kind, b"") for kind in (b"C", b"3")),
        READY,
    ]
)
SET = message(b"Q", b"set app.user_id = 'alice'\0")
SELECT = message(b"Q", b"select * from notes\0")


class Line:
    """A conversation of alice's app, and what came out at both ends."""

    def __init__(self) -> None:
        self.to_client = b""
        self.to_server = b""
        self.uses: list[Use] = []
        self.talk = Conversation("app", self._client, self._server, self.uses.append, lambda: 0.0)
        self.talk.server_says(READY)
        self.to_client = b""

    def _client(self, data: bytes) -> None:
        self.to_client += data

    def _server(self, data: bytes) -> None:
        self.to_server += data


def cuts(data: bytes, at: set[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[begin:end] for begin, end in pairwise(places)]


PLACES = st.sets(st.integers(0, 10_000), max_size=20)


@given(st.lists(st.tuples(st.sampled_from(b"QDdZ"), st.binary(max_size=50)), max_size=20), PLACES)
def test_nothing_is_lost_wherever_the_bytes_are_cut(messages: list[tuple[int, bytes]], at: set[int]) -> None:
    sent = [message(bytes([kind]), payload) for kind, payload in messages]
    cutter = Cutter(frozenset(b"QZ"))
    pieces = [piece for part in cuts(b"".join(sent), at) for piece in cutter.cut(part)]
    assert b"".join(raw for _, raw in pieces) == b"".join(sent)
    assert cutter.rest() == b""
    assert [raw for kind, raw in pieces if kind] == [one for one in sent if one[:1] in (b"Q", b"Z")]


def test_a_long_message_is_not_held_up() -> None:
    sent = message(b"Q", b"x" * (3 * LOOKED_AT))
    cutter = Cutter(frozenset(b"Q"))
    pieces = [piece for begin in range(0, len(sent), 65536) for piece in cutter.cut(sent[begin : begin + 65536])]
    assert b"".join(raw for _, raw in pieces) == sent
    assert [len(raw) for kind, raw in pieces if kind] == [LOOKED_AT]
    assert list(cutter.cut(READY + SET)) == [(0, READY), (ord("Q"), SET)]


def test_what_is_no_message_is_given_back() -> None:
    cutter = Cutter(frozenset(b"Q"))
    pieces: list[Piece] = []
    with pytest.raises(FramingError):
        pieces.extend(cutter.cut(SET + b"Q\0\0\0\1rest"))
    assert cutter.rest() == b"Q\0\0\0\1rest"


@given(PLACES, PLACES, st.integers(0, 6))
def test_the_question_is_seen_by_nobody(client_at: set[int], server_at: set[int], place: int) -> None:
    line = Line()
    for part in cuts(SET, client_at):
        line.talk.client_says(part)
    assert line.to_server == SET
    # A notification may come at any place between the messages of the answer.
    answered = [*_messages(ANSWER)]
    answered.insert(place, NOTIFIED)
    line.talk.server_says(DONE + READY)
    assert line.talk.is_asking
    for part in cuts(SELECT, client_at):
        line.talk.client_says(part)
    assert line.to_server == SET + QUESTION
    for part in cuts(b"".join(answered), server_at):
        line.talk.server_says(part)
    assert line.to_server == SET + QUESTION + SELECT
    assert line.to_client == DONE + READY + NOTIFIED
    assert [use.settings for use in line.uses] == [{"app.user_id": "alice"}]


def _messages(data: bytes) -> list[bytes]:
    return [raw for _, raw in Cutter(frozenset(range(256))).cut(data)]


def test_nothing_is_asked_while_an_answer_is_due_or_a_transaction_is_open() -> None:
    line = Line()
    line.talk.client_says(SET + SELECT)
    line.talk.server_says(DONE + READY)
    assert not line.talk.is_asking
    line.talk.server_says(DONE + message(b"Z", b"T"))
    assert not line.talk.is_asking
    line.talk.client_says(message(b"P", b"\0select 1\0\0\0") + message(b"S", b""))
    line.talk.server_says(READY)
    assert line.talk.is_asking


def test_a_copy_by_the_extended_protocol_has_one_sync_left_out() -> None:
    line = Line()
    copy = message(b"P", b"\0copy t from stdin\0\0\0") + message(b"B", b"\0" * 8) + message(b"S", b"")
    line.talk.client_says(SET)
    line.talk.server_says(DONE + READY + ANSWER)
    line.talk.client_says(copy)
    line.talk.server_says(message(b"G", b"\0\0\0"))
    line.talk.client_says(message(b"d", b"1\n") + message(b"c", b"") + message(b"S", b""))
    assert not line.talk.is_asking
    line.talk.server_says(DONE + READY)
    assert line.talk.is_asking


def test_a_server_that_ends_instead_of_answering_is_heard() -> None:
    line = Line()
    line.talk.client_says(SET)
    failure = message(b"E", b"SFATAL\0\0")
    line.talk.server_says(DONE + READY + failure)
    line.talk.server_ends()
    assert line.to_client == DONE + READY + failure


@pytest.mark.parametrize("lost_by", [b"Q\0\0\0\1", message(b"F", b"")])
def test_what_cannot_be_followed_passes_as_it_is(lost_by: bytes) -> None:
    line = Line()
    line.talk.client_says(SET[:10])
    line.talk.server_says(READY)  # nobody asked for it
    assert line.talk.is_lost
    line.talk.client_says(SET[10:] + lost_by)
    assert line.to_server == SET + lost_by
    line.talk.server_says(b"anything")
    assert line.to_client == READY + b"anything"


def test_no_mechanism_is_offered_that_binds_to_tls() -> None:
    line = Line()
    first: list[bytes] = []
    talk = Conversation("app", first.append, lambda _: None, line.uses.append, lambda: 0.0)
    code = struct.pack("!I", 10)
    talk.server_says(message(b"R", code + b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"))
    assert first == [message(b"R", code + b"SCRAM-SHA-256\0\0")]


@pytest.mark.parametrize(
    ("text", "names", "preparing"),
    [
        (b"set app.x = 1", [{"app.x"}], [True]),
        (b"update t set name = 'set_config('", [set()], [False]),
        (b"select ';', $$;$$, \";\" -- ; set a = 1", [set()], [False]),
        (b"begin; set local role alice", [set(), {"role"}], [True, True]),
        (b"SET SESSION AUTHORIZATION alice", [{"session_authorization"}], [True]),
        (b"set time zone 'utc'", [{"timezone"}], [True]),
        (b"set session characteristics as transaction read only", [set()], [True]),
        (b"select set_config('a.b', 'x''y', true) as x", [{"a.b"}], [True]),
        (b"select set_config('a.b', name, true) from t", [{"a.b"}], [False]),
        (b"", [set()], [True]),
        (b"select 1 from t", [set()], [False]),
    ],
)
def test_what_a_text_sets(text: bytes, names: list[set[str]], preparing: list[bool]) -> None:
    parts = list(parts_of(text))
    assert [set(part.names) for part in parts] == names
    assert [part.is_preparing for part in parts] == preparing


@pytest.mark.parametrize(
    "text", [b"'" * 60_000, b"select set_config(" + b"e''" * 20_000, b"$a$" * 20_000, b"/*" * 30_000]
)
def test_a_text_made_to_take_long_does_not(text: bytes) -> None:
    assert list(parts_of(text))
