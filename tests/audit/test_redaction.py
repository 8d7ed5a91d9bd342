"""What of an application's data goes into a record."""

import datetime
import json
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm_middleware.audit.records import UserMention
from ucm_middleware.audit.redaction import (
    MOST_BYTES,
    MOST_CHARACTERS,
    MOST_DEPTH,
    REDACTED,
    for_record,
    is_secret,
    text_for_record,
)

SECRET = "hunter2"


def encoded(data: Mapping[str, object]) -> str:
    """As a record is written: also as UTF-8."""
    shown = for_record(data)
    json.dumps(shown, ensure_ascii=False, allow_nan=False).encode()
    return json.dumps(shown, allow_nan=False)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *("password", "PASSWORD", "user_password", "userPassword", "dbpassword", "passwd", "pwd", "passphrase"),
            *(
                "secret",
                "client_secret",
                "clientSecret",
                "secrets",
                "token",
                "access_token",
                "accessToken",
                "csrf-token",
            ),
            *("authtoken", "tokens", "api_key", "apiKey", "X-API-Key", "apikey", "API_KEY", "APIKey", "private_key"),
            *("aws_secret_access_key", "accessKeyId", "Authorization", "proxy-authorization", "Cookie", "set-cookie"),
            *("cookies", "credentials", "credential", "session_id", "sessionId", "SESSIONID", "session key", "jwt"),
            *("otp", "otp_code", "pin", "card_pin", "cvv", "JSESSIONID", "PHPSESSID", "signing_key", "password_hash"),
            *("token1", "new-password-2", "x" * 2000 + "_token"),
        ],
    )
    def test_a_secret_is_told_by_its_name(self, name: str) -> None:
        assert is_secret(name) is (len(name) < MOST_CHARACTERS)  # of a longer one, nobody looks at the end
        if len(name) < MOST_CHARACTERS:
            assert for_record({name: SECRET}) == {name: REDACTED}

    @pytest.mark.parametrize(
        "name",
        [
            *(
                "tokenizer",
                "token_count",
                "tokenCount",
                "max_token_limit",
                "password_length",
                "token_type",
                "cookie_size",
            ),
            *("ticket", "key", "keyboard", "api", "session", "author", "pinned", "spinner", "opinion", "secretary"),
            *("compass", "public_key", "user_id", "hotpath", "", "...", "секрет"),
        ],
    )
    def test_what_only_sounds_like_one_is_shown(self, name: str) -> None:
        assert not is_secret(name)
        assert for_record({name: SECRET}) == {name: SECRET}

    def test_how_many_tokens_it_took_is_shown_and_tokens_are_not(self) -> None:
        shown = for_record({"max_tokens": 512, "tokens": [SECRET], "token": 123456, "totalTokens": 7.5})
        assert shown == {"max_tokens": 512, "tokens": REDACTED, "token": REDACTED, "totalTokens": 7.5}

    def test_whether_there_is_a_secret_is_none(self) -> None:
        assert for_record({"has_password": True, "token": None}) == {"has_password": True, "token": None}

    def test_at_any_depth_and_whatever_it_is(self) -> None:
        data = {
            "a": [{"b": {"password": SECRET, "c": 1}}],
            "credentials": {"user": "alice", "hint": SECRET},
            "tokens": (SECRET, [SECRET]),
            "frozen": MappingProxyType({"api_key": SECRET}),
            "headers": [("Authorization", SECRET), ["cookie", SECRET], ("accept", "text/html")],
            "queue": deque([{"otp": 123456}]),
        }
        shown = for_record(data)
        assert SECRET not in json.dumps(shown)
        assert "123456" not in json.dumps(shown)
        assert shown["a"] == [{"b": {"password": REDACTED, "c": 1}}]
        assert shown["headers"] == [["Authorization", REDACTED], ["cookie", REDACTED], ["accept", "text/html"]]

    def test_two_names_are_no_pair(self) -> None:
        assert for_record({"parameters": ["password", "query"]}) == {"parameters": ["password", "query"]}


class Angry(Mapping[str, object]):
    def __getitem__(self, key: str) -> object:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        raise OSError(SECRET)

    def __len__(self) -> int:
        raise OSError(SECRET)


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "a lie"


class TestValues:
    def test_plain_values_are_as_they_are(self) -> None:
        data: dict[str, Any] = {
            "text": "ä€😀",
            "n": -7,
            "f": 0.5,
            "yes": True,
            "none": None,
            "list": [1, [2]],
            "d": {"k": {}},
        }
        assert for_record(data) == data

    def test_it_is_a_copy(self) -> None:
        data = {"a": {"b": [1]}}
        shown = for_record(data)
        data["a"]["b"].append(2)
        assert shown == {"a": {"b": [1]}}

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (math.nan, "<float>"),
            (-math.inf, "<float>"),
            (1 << 5000, "<int>"),
            (b"bytes", "<bytes>"),
            (bytearray(9), "<bytearray>"),
            (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), "<datetime>"),
            (threading.Lock(), "<lock>"),
            (1j, "<complex>"),
            (range(3), "<range>"),
            ({3}, [3]),
            ((1, 2), [1, 2]),
            (OrderedDict(a=1), {"a": 1}),
            ({1: "a", None: "b", (1,): "d", 2.5: "e"}, {"1": "a", "None": "b", "<tuple>": "d", "2.5": "e"}),
            (Text("text"), "text"),
            (Angry(), "<Angry, which raised OSError>"),
        ],
    )
    def test_what_json_has_not_is_shown_by_its_type(self, value: object, shown: object) -> None:
        assert for_record({"value": value}) == {"value": shown}
        assert SECRET not in encoded({"value": value})

    def test_what_cannot_be_read_at_all_is_no_error(self) -> None:
        assert for_record(Angry()) == {"unreadable": "<Angry, which raised OSError>"}

    def test_half_a_surrogate_pair_can_be_written(self) -> None:
        assert for_record({"\ud800": ["a\udc80"]}) == {"\\ud800": ["a\\udc80"]}

    def test_a_mention_of_a_user_stays_one(self) -> None:
        shown = for_record({"to": [UserMention("alice")]})
        assert type(shown["to"][0]) is UserMention


class TestLimits:
    def test_a_long_text_says_how_much_it_was(self) -> None:
        assert text_for_record("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
        assert text_for_record("x" * 1224) == "x" * MOST_CHARACTERS + "... (200 characters more)"
        assert for_record({"k" * 1100: 1}) == {"k" * MOST_CHARACTERS + "... (76 characters more)": 1}

    def test_many_items_say_how_many_there_were(self) -> None:
        shown = for_record({"list": list(range(100_000)), "after": 1})
        note = shown["list"][-1]
        assert note == f"<{100_000 - len(shown['list']) + 1} more left out>"
        assert shown["..."] == "<1 more left out>"
        wide = for_record({f"key-{number}": number for number in range(5000)})
        assert wide["..."] == f"<{5000 - len(wide) + 1} more left out>"

    def test_nearly_all_of_the_room_is_used(self) -> None:
        assert len(encoded({"list": ["x" * 50] * 1000})) > MOST_BYTES * 0.8

    def test_what_is_too_deep_or_goes_round_says_so(self) -> None:
        endless: list[object] = []
        endless.append(endless)
        shown: Any = for_record({"endless": endless})
        for _ in range(MOST_DEPTH - 1):
            shown = next(iter(shown.values())) if isinstance(shown, dict) else shown[0]
        assert shown == ["<list, nested too deeply>"]

    @pytest.mark.parametrize(
        "data",
        [
            {"texts": ["😀" * 1000] * 100},
            {"keys": {chr(0x1F600 + number) * 500: 1 for number in range(50)}},
            {"empty": [[[[]] * 100] * 100] * 100},
            {"a": {"b": {"c": [{"d": ["x" * 1000] * 5} for _ in range(9)], "e": "y" * 2000}, "f": 1}, "g": 2},
            {"control": "\0" * 5000},
        ],
    )
    def test_the_whole_is_never_longer_than_the_limit(self, data: Mapping[str, object]) -> None:
        assert len(encoded(data)) <= MOST_BYTES

    @settings(max_examples=30)
    @given(
        st.dictionaries(
            st.text(st.characters(), max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()) | st.integers(), inner),
                max_leaves=30,
            ),
        )
    )
    def test_whatever_it_is_it_can_be_written(self, data: dict[str, object]) -> None:
        assert len(encoded(data)) <= MOST_BYTES
