"""What is a token, and that each protected one is found in a text again, and nothing else, against a slow reference."""

import base64
import json
import os
import re
import secrets
import string
import threading
import uuid
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.clock import Clock
from ucm_middleware import InvalidContextError
from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import Token, cut, token_of

pytestmark = pytest.mark.security

HEX = "9f3c1a7be85d20c46fa17d39b2e80c54"
URLSAFE = "kX9_tR2vLq7-Zp4mNw8sYb3cHd6fJg1a"
UUID = "46743ea2-5b1a-4775-8c8d-61670f29523c"
SPLIT = "hY7Lx_Qa9Tb2_Wm5Rk8_Zd"
JWT = f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhbGljZSJ9.{URLSAFE}Q2w5Xv0BnM"
TOKENS = [HEX, URLSAFE, UUID, SPLIT, JWT]


def table(clock: Clock | None = None, most: int = 1000) -> ProtectedValues:
    return ProtectedValues(most, 60.0, Clock() if clock is None else clock)


@pytest.mark.parametrize("value", TOKENS)
class TestFound:
    @pytest.mark.parametrize(
        "text",
        [
            "%s",
            '{"token":"%s"}',
            "Bearer %s, and more",
            "?a=1&t=%s&b=2",
            "id-%s",
            "\\n%s",
            "\\u0022%s\\u0022",
            "%%20%s%%20",
            "\\x1b%s",
            "\\054%s",
        ],
    )
    def test_in_texts_of_all_sorts(self, value: str, text: str) -> None:
        if text == "id-%s" and value in (UUID, SPLIT):
            text = "id:%s"
        values = table()
        values.add(token_of(value, 64), "alice")
        data = (text % value).encode()
        assert values.may_hold(data)
        assert {place.owners for place in values.find(data)} == {frozenset({"alice"})}

    def test_not_when_one_letter_is_another(self, value: str) -> None:
        values = table()
        token = token_of(value, 64)
        values.add(token, "alice")
        at = value.index(token.run.decode())
        other = value[:at] + ("A" if value[at] != "A" else "B") + value[at + 1 :]
        assert not list(values.find(other.encode()))

    def test_the_value_is_kept_nowhere(self, value: str) -> None:
        values = table()
        values.add(token_of(value, 64), "alice")
        assert token_of(value, 64).run not in repr(values._rows).encode()


class TestWhatAUuidIsKnownBy:
    def test_its_last_part_alone_is_not_it(self) -> None:
        values = table()
        values.add(token_of(UUID, 64), "alice")
        assert values.may_hold(b"00000000-0000-4000-8000-61670f29523c")
        assert not list(values.find(b"00000000-0000-4000-8000-61670f29523c"))

    def test_two_with_the_same_last_part_are_two(self) -> None:
        values = table()
        other = "00000000-0000-4abc-8000-61670f29523c"
        values.add(token_of(UUID, 64), "alice")
        values.add(token_of(other, 50), "bob")
        assert [place.owners for place in values.find(f"{UUID} {other}".encode())] == [{"alice"}, {"bob"}]


class TestWhatIsNoToken:
    @pytest.mark.parametrize(
        "value",
        [
            "", "hello world", "password1", "1234567890", "a" * 40, "abcdefghijklmnopqrstuvwxyz", "ab" * 20,
            "thé" + HEX, f" {HEX}", f"{HEX}\n", "x" * 5000, "c8e40726-ec86-11f1-8db5-02fc00000001", "abc-def-ghi-jkl",
        ],
    )  # fmt: skip
    def test_is_refused_without_being_shown(self, value: str) -> None:
        with pytest.raises(InvalidContextError) as caught:
            token_of(value, 64)
        assert caught.value.field == "value"
        assert len(value) < 6 or value.strip() not in str(caught.value)

    def test_nor_what_is_no_text(self) -> None:
        with pytest.raises(InvalidContextError, match="int"):
            token_of(17, 64)

    def test_a_jwt_is_known_by_its_signature(self) -> None:
        assert token_of(JWT, 64).run.decode() in JWT.rsplit(".", 1)[1]


KINDS = {
    "urlsafe 32": lambda: secrets.token_urlsafe(32),
    "urlsafe 16": lambda: secrets.token_urlsafe(16),
    "uuid4": lambda: str(uuid.uuid4()),
    "hex 32": lambda: secrets.token_hex(16),
    "base64": lambda: base64.b64encode(secrets.token_bytes(16)).decode(),
    "base64 of 32": lambda: base64.b64encode(secrets.token_bytes(32)).decode(),
}


class TestRandomTokens:
    @pytest.mark.parametrize("kind", KINDS)
    def test_none_is_refused_and_each_is_found(self, kind: str) -> None:
        values = table(most=100_000)
        for _ in range(4000):
            value = KINDS[kind]()
            values.add(token_of(value, 64), value)
            places = list(values.find(f'{{"token":"{value}"}}'.encode()))
            assert [place.owners for place in places] == [{value}], value

    @pytest.mark.parametrize("value", ["x-cT_5cb-cX-Cxihe_aeBA", "w909m_D0hKl-detRw_NhEg", "VJ2T/IoLYg/pTnRMcR4PtA=="])
    def test_nor_these_that_are_cut_up_by_their_separators(self, value: str) -> None:
        token_of(value, 64)

    def test_values_that_begin_with_the_same_word_are_many(self) -> None:
        values = table()
        tokens = [f"production_{secrets.token_hex(6)}" for _ in range(50)]
        for value in tokens:
            values.add(token_of(value, 64), value)
        assert all([place.owners for place in values.find(value.encode())] == [{value}] for value in tokens)


class TestShares:
    def test_one_user_does_not_push_out_what_others_protect(self) -> None:
        values = table(most=5000)
        values.add(token_of(HEX, 64), "alice")
        for number in range(6000):
            run = f"{number:032d}".encode()
            values.add(Token(run, run, 0, 0), "mallory")
        assert list(values.find(HEX.encode()))
        assert len(values) == 1001
        assert (values.forgotten, values.refused) == (0, 5000)

    def test_nor_do_all_who_are_anonymous(self) -> None:
        values = table(most=15_000)
        for number in range(6000):
            run = f"{number:032d}".encode()
            values.add(Token(run, run, 0, 0), f"anonymous_{number:032x}")
        assert len(values) == 1500

    def test_there_is_room_again_for_what_was_forgotten(self) -> None:
        clock = Clock()
        values = table(clock, most=3)
        for turn in range(3):
            for number in range(3):
                run = f"{turn}{number:032d}".encode()
                assert values.add(Token(run, run, 0, 0), "alice")
                assert values.add(Token(run, run, 0, 0), "alice")
            clock.advance(61)
            values.sweep()
        assert values._held == {}


class TestOneRunOfSeveral:
    def test_a_value_that_is_somebodys_leaves_its_neighbours_alone(self) -> None:
        values = table()
        other = "00000000-0000-4abc-8000-61670f29523c"
        values.add(token_of(UUID, 50), "alice")
        values.add(token_of(other, 50), "bob")
        assert not values.add(token_of(UUID, 50), "mallory", is_first=True)
        assert [place.owners for place in values.find(f"{UUID} {other}".encode())] == [{"alice"}, {"bob"}]


class TestOwners:
    def test_two_who_protect_a_value_both_own_it(self) -> None:
        values = table()
        values.add(token_of(HEX, 64), "alice")
        values.add(token_of(HEX, 64), "bob")
        assert [place.owners for place in values.find(HEX.encode())] == [{"alice", "bob"}]

    def test_the_first_one_by_a_field_owns_it(self) -> None:
        values = table()
        assert values.add(token_of(HEX, 64), "alice", is_first=True)
        assert not values.add(token_of(HEX, 64), "bob", is_first=True)
        assert [place.owners for place in values.find(HEX.encode())] == [{"alice"}]

    def test_what_an_anonymous_user_protected_can_be_moved(self) -> None:
        values = table()
        token = token_of(HEX, 64)
        values.add(token, "anonymous_1")
        values.move(hash(token.run), "anonymous_1", "alice")
        assert [place.owners for place in values.find(HEX.encode())] == [{"alice"}]


class TestTime:
    def test_a_value_is_forgotten_at_its_deadline(self) -> None:
        clock = Clock()
        values = table(clock)
        values.add(token_of(HEX, 64), "alice")
        clock.advance(59.9)
        values.sweep()
        assert list(values.find(HEX.encode()))
        clock.advance(0.2)
        assert not list(values.find(HEX.encode()))
        values.sweep()
        assert len(values) == 0
        assert values.next_wake() is None

    def test_protecting_it_again_renews_it(self) -> None:
        clock = Clock()
        values = table(clock)
        for value in (HEX, URLSAFE):
            values.add(token_of(value, 64), "alice")
        clock.advance(40)
        values.add(token_of(HEX, 64), "alice")
        clock.advance(40)
        values.sweep()
        assert len(values) == 1
        assert list(values.find(HEX.encode()))

    def test_sweeping_takes_all_that_is_due(self) -> None:
        clock = Clock()
        values = table(clock, most=5000)
        for number in range(2500):
            run = f"{number:032d}".encode()
            values.add(Token(run, run, 0, 0), "alice")
        clock.advance(61)
        values.sweep()
        assert len(values) == 0

    def test_the_oldest_makes_room(self) -> None:
        values = table(most=2)
        for value in (HEX, URLSAFE, UUID):
            values.add(token_of(value, 64), "alice")
        assert len(values) == 2
        assert values.forgotten == 1
        assert not list(values.find(HEX.encode()))
        assert list(values.find(UUID.encode()))


def test_a_child_has_the_values_and_a_lock_of_its_own() -> None:
    values = table()
    values.add(token_of(HEX, 64), "alice")
    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        with values._lock:
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child
        values.add(token_of(UUID, 64), "bob")
        os._exit(0 if len(list(values.find(f"{HEX} {UUID}".encode()))) == 2 else 1)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


RUNS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=40)
PIECES = st.one_of(
    st.sampled_from(TOKENS),
    RUNS,
    st.sampled_from([" ", '"', "\\n", "\\u0022", "%20", "-", "_", ".", "é", '{"a":', "\\", "%"]),
)


def reference(text: str, values: list[str]) -> set[str]:
    """Which of these stand in a text: one by one, between what is no letter or digit, or behind an escape."""
    found = set[str]()
    for value in values:
        token = token_of(value, 64)
        for match in re.finditer(re.escape(token.run.decode()), text):
            before, after = text[: match.start()], text[match.end() :]
            is_glued = (
                re.search(r"(\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[0-7]{3}|\\[a-z]|%[0-9a-fA-F]{2})\Z", before)
                is not None
            )
            if (is_glued or not re.search(r"[A-Za-z0-9]\Z", before)) and not re.match(r"[A-Za-z0-9]", after):
                start = match.start() - token.before
                if start >= 0 and text[start : match.end() + token.after].encode() == token.checked:
                    found.add(value)
    return found


@given(st.lists(PIECES, max_size=12), st.lists(st.sampled_from(TOKENS), unique=True))
@settings(max_examples=500, deadline=None)
def test_finds_what_a_slow_reference_finds(pieces: list[str], protected: list[str]) -> None:
    values = table()
    for value in protected:
        values.add(token_of(value, 64), value)
    text = "".join(pieces)
    data = text.encode()
    found = {owner for place in values.find(data) for owner in place.owners}
    assert found == reference(text, protected)
    assert values.may_hold(data) or not found


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(TOKENS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.lists(st.integers(0, 2000)))
@settings(max_examples=300, deadline=None)
def test_chunks_at_any_place_change_nothing(document: object, places: list[int]) -> None:
    values = table()
    for value in TOKENS:
        values.add(token_of(value, 64), value)
    data = json.dumps(document).encode()
    whole = {owner for place in values.find(data) for owner in place.owners}
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    found, rest = set[str](), b""
    for start, end in pairwise(borders):
        complete, rest = cut(rest + data[start:end])
        found |= {owner for place in values.find(complete) for owner in place.owners}
    found |= {owner for place in values.find(rest) for owner in place.owners}
    assert found == whole
