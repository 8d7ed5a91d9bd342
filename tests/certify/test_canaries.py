"""Canaries are found in whatever form they come, in nothing else, and never as another's."""

import base64
import html
import json
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware.certify.canaries import Canaries, Canary
from ucm_middleware.certify.cast import Cast, User, strangers

SECRET = "naïve \"key\" of <alice> & 'co'/+1"
USERS = Cast((User("alice", secrets=(SECRET,)), User("bob", secrets=("key of bob, 0001",)), User("carol")))
CANARIES = Canaries(USERS, 7)

FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "URL": lambda text: quote(text, safe=""),
    "URL with slashes": quote,
    "form": quote_plus,
    "JSON": json.dumps,
    "JSON without escapes": lambda text: json.dumps(text, ensure_ascii=False),
    "HTML": html.escape,
    "HTML of MarkupSafe": lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    "repr": repr,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of JSON": lambda text: base64.b64encode(json.dumps({"a": text}).encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(f"{{{text}}}".encode()).decode().rstrip("="),
    "in a cookie of a session": lambda text: "s=" + base64.b64encode(f"12{text}".encode()).decode() + ".sig; Path=/",
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def found(text: str, viewer: str, canaries: Canaries = CANARIES) -> list[Canary]:
    return list(canaries.of_others(text.encode(), viewer))


@each_form
@given(st.text(max_size=20), st.text(max_size=20))
def test_a_secret_is_found_in_each_form_as_its_owner_s(form: Callable[[str], str], before: str, behind: str) -> None:
    text = f"{before} {form(SECRET)} {behind}"
    assert found(text, "bob") == [Canary("alice", None)]
    assert found(text, "alice") == []


@each_form
@given(st.integers(0, 2**24 - 1), st.sampled_from(USERS.names))
def test_a_canary_that_was_made_is_found_in_each_form(form: Callable[[str], str], number: int, owner: str) -> None:
    text = form(CANARIES.make(owner, number))
    assert [*CANARIES.all_in(text.encode())][:1] == [Canary(owner, number)]
    assert found(text, owner) == []


def test_a_canary_is_found_in_any_case() -> None:
    assert found(CANARIES.make("alice", 3).upper(), "bob") == [Canary("alice", 3)]


def test_a_secret_in_a_header_s_encoding_is_found() -> None:
    assert [*CANARIES.of_others(SECRET.encode("latin-1"), "bob")] == [Canary("alice", None)]


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode) | st.binary(max_size=200).map(base64.b64encode))
def test_nothing_is_found_in_anything_else(data: bytes) -> None:
    assert [*CANARIES.all_in(data)] == []


@given(st.text("abcdefghijkl -_0", min_size=7, max_size=20), st.integers(0, 5))
def test_secrets_that_differ_in_one_letter_are_told_apart_in_base64(text: str, padding: int) -> None:
    """The ends of base64 text say less than a letter: alone they are alike."""
    alice, bob = (f"{text}{last}" for last in "12")
    canaries = Canaries(Cast((User("alice", secrets=(alice,)), User("bob", secrets=(bob,)))), 1)
    cookie = base64.b64encode(b"." * padding + bob.encode()).decode()
    assert found(cookie, "bob", canaries) == []
    assert found(cookie, "alice", canaries) == [Canary("bob", None)]


def test_what_the_witness_looks_for_stands_in_each_form() -> None:
    made, secret = CANARIES.make("alice", 1), SECRET
    for name, form in FORMS.items():
        for text in (form(made), form(secret)):
            assert any(pattern in text for pattern in CANARIES.patterns()), name


def test_those_of_another_run_are_nobody_s() -> None:
    assert found(Canaries(USERS, 8).make("alice", 1), "bob") == []


def test_all_users_have_their_own() -> None:
    cast = strangers(256)
    canaries = Canaries(cast, 1)
    for name in cast.names:
        assert [*canaries.all_in(canaries.make(name, 5).encode())] == [Canary(name, 5)]
