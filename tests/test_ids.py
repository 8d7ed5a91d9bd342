"""Ids: what is refused and why, what passes untouched, and that made ids order, parse and never repeat."""

import os
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import NoReturn
from unittest.mock import Mock

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ucm_middleware.errors import ConfigurationError, InvalidContextError
from ucm_middleware.ids import Core, IDKind, ParsedID, UnifiedIDManager, validate_id

CORE = "18a0b1c2d3e4f5a6" + "0123456789abcdef"

# Default_Ignorable_Code_Point=Yes of Unicode's DerivedCoreProperties.txt, as ranges with both ends in.
DEFAULT_IGNORABLE = [
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
]  # fmt: skip
BLANK_GLYPHS = "\u2800\ufffc\U00013441\U00013442\U00016fe4\U0001d159"
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.fixture(autouse=True)
def _in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_ENVIRONMENT", raising=False)


def in_category(category: str) -> list[str]:
    return [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == category]


def rule_broken_by(value: object) -> str:
    with pytest.raises(InvalidContextError) as caught:
        validate_id(value, "thread_id")
    assert caught.value.field == "thread_id"
    assert caught.value.remedy
    return caught.value.rule


def is_refused(value: object) -> bool:
    try:
        validate_id(value, "user_id")
    except InvalidContextError:
        return True
    return False


@pytest.mark.parametrize("value", [None, 0, 7.5, True, b"alice", ["alice"], object(), str])
def test_what_is_not_text_is_refused(value: object) -> None:
    assert rule_broken_by(value) == f"is not text but {type(value).__name__}"


def test_what_only_claims_to_be_text_is_refused() -> None:
    claims = Mock(spec=str)
    assert isinstance(claims, str)
    assert rule_broken_by(claims) == "is not text but Mock"


def test_what_is_no_text_is_told_how_to_become_some() -> None:
    with pytest.raises(InvalidContextError, match=r"user_id: is not text but int; give a str, such as str\(user\.id\)"):
        validate_id(7, "user_id")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("", "is empty"),
        (" ", "is blank"),
        (" \t\u3000\n", "is blank"),
        (" alice", "has blanks around it"),
        ("alice ", "has blanks around it"),
        ("山田 ", "has blanks around it"),
        ("a" * 257, "has more than 256 characters"),
        (" " * 257, "has more than 256 characters"),
        ("\n" * 257, "has more than 256 characters"),
        ("alice\r\nX-Admin: 1", "has a control character in it"),
        ("alice\n", "has a control character in it"),
        ("alice\0", "has a control character in it"),
        ("al\u200bice", "has an invisible or unassigned character in it"),
        ("alice\ud800", "has an invisible or unassigned character in it"),
        ("山田\u3000太郎", "has an invisible or unassigned character in it"),
    ],
)
def test_the_rule_is_named(value: str, rule: str) -> None:
    assert rule_broken_by(value) == rule


@pytest.mark.parametrize("value", ["a" * 256, "я" * 256, "🙂" * 256])
def test_256_characters_pass_whatever_their_width(value: str) -> None:
    assert validate_id(value, "user_id") is value


def test_every_control_character_is_refused() -> None:
    characters = in_category("Cc")
    assert len(characters) == 65
    assert {rule_broken_by(f"al{character}ice") for character in characters} == {"has a control character in it"}


def test_every_bidirectional_control_is_refused_as_such() -> None:
    assert {rule_broken_by(f"al{character}ice") for character in BIDIRECTIONAL} == {"has a bidirectional control in it"}


@pytest.mark.parametrize("category", ["Cf", "Zs", "Zl", "Zp"])
def test_every_format_character_and_separator_is_refused_but_the_space(category: str) -> None:
    assert [c for c in in_category(category) if not is_refused(f"al{c}ice")] == [" "] * (category == "Zs")


def test_every_default_ignorable_character_is_refused() -> None:
    characters = [chr(code) for first, last in DEFAULT_IGNORABLE for code in range(first, last + 1)]
    assert [c for c in characters if not is_refused(f"al{c}ice")] == []


@pytest.mark.parametrize("character", BLANK_GLYPHS)
def test_symbols_and_letters_with_a_blank_glyph_are_refused(character: str) -> None:
    assert rule_broken_by(f"al{character}ice") == "has an invisible or unassigned character in it"


@given(st.text(min_size=1, max_size=60), st.characters(categories=["Cs", "Co", "Cn"]))
def test_surrogates_private_and_unassigned_characters_are_refused_anywhere(text: str, character: str) -> None:
    for place in (0, len(text) // 2, len(text)):
        assert is_refused(text[:place] + character + text[place:])


def test_the_remedy_says_which_character_and_where() -> None:
    with pytest.raises(InvalidContextError, match=r"^user_id: .*; remove U\+202E at index 2$"):
        validate_id("al\u202eice", "user_id")


PLACEHOLDERS = [
    "placeholder", "none", "null", "undefined", "test", "default", "unknown", "anonymous", "example", "template",
    "temp", "tmp", "dummy", "string", "changeme", "xxx", "tbd", "n/a", "[object Object]",
]  # fmt: skip


@pytest.mark.parametrize("word", PLACEHOLDERS)
@given(data=st.data())
def test_placeholders_are_refused_in_any_case(word: str, data: st.DataObject) -> None:
    spelling = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in word)
    assert rule_broken_by(spelling) == "is a placeholder"


PREFIXES = [
    "placeholder", "temp", "tmp", "mock", "fake", "dummy", "default", "example", "sample", "template", "none", "null",
    "undefined",
]  # fmt: skip


@pytest.mark.parametrize("prefix", [*PREFIXES, *(word.upper() for word in PREFIXES), "Mock"])
def test_a_placeholder_prefix_is_refused_on_ids_under_20_characters(prefix: str) -> None:
    short, long = f"{prefix}_".ljust(19, "7"), f"{prefix}_".ljust(20, "7")
    assert rule_broken_by(short) == f"begins with the placeholder {prefix.lower()}_ and has fewer than 20 characters"
    for value in (f"{prefix}_", f"{prefix}_a_b"):
        assert rule_broken_by(value).startswith("begins with the placeholder")
    assert validate_id(long, "user_id") is long


@pytest.mark.parametrize("value", ["test_1", "TEST_1", "test_", "test_".ljust(19, "7")])
@pytest.mark.parametrize("environment", ["", "production", "staging", "development"])
def test_a_short_test_id_is_refused_outside_testing(
    value: str, environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCM_ENVIRONMENT", environment)
    assert rule_broken_by(value) == "begins with test_ and has fewer than 20 characters outside a testing environment"


def test_a_short_test_id_passes_in_testing_only_while_it_is_testing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_ENVIRONMENT", "testing")
    assert validate_id("Test_1", "user_id") == "Test_1"
    assert rule_broken_by("test") == "is a placeholder"
    assert rule_broken_by("mock_1").startswith("begins with the placeholder")
    monkeypatch.delenv("UCM_ENVIRONMENT")
    assert is_refused("Test_1")


def test_a_long_test_id_passes_everywhere() -> None:
    assert validate_id("test_".ljust(20, "7"), "user_id") == "test_777777777777777"


def test_a_misspelt_environment_is_not_taken_for_testing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_ENVIRONMENT", "Testing")
    with pytest.raises(ConfigurationError, match="UCM_ENVIRONMENT"):
        validate_id("test_1", "user_id")


@pytest.mark.parametrize(
    "value", ["anonymous_", "anonymous_1", "Anonymous_Bob", f"ANONYMOUS_{CORE}", f"anonymous_{CORE}"]
)
@pytest.mark.parametrize("environment", ["production", "testing"])
def test_the_prefix_of_anonymous_ids_is_reserved(value: str, environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_ENVIRONMENT", environment)
    assert rule_broken_by(value) == "begins with anonymous_, which is reserved"


@pytest.mark.parametrize(
    "value",
    [
        "alice", "bob", "a", "0", "1", "42", "-1", "alice@example.com", "Alice.B+tag@example.co.uk", "auth0|5f7c",
        "6a0f0f3e-5c7b-4c59-9d1c-d3f1f6d2e111", "6A0F0F3E5C7B4C599D1CD3F1F6D2E111", "google-oauth2|1149", "urn:uuid:1",
        "Test-Hausen", "test-hausen", "testament", "contest", "my_test", "latest_1", "O'Brien", "Carol O\u2019Neil",
        "Zoë", "Zoe\u0308", "山田太郎", "Ольга", "محمد", "दीपक", "김민수", "ไพลิน", "Alice B", "Alice  B", "user_1",
        "template-tom", "Templeton", "nonesuch", "nullarbor", "defaults", "mockingbird", "Nil", "Nan", "Todo", "Guest",
        "Sample", "Mock", "Fake", "admin", "demo", "a_temp_", "_temp_1", "_", "__", "anonymously", "anonymous-fan",
        "CN=Alice,OU=Ops", "👩", "<alice>", "a/b", "..", "%0a", "thread_1", "acme_x", "x_anonymous_", "tempo_1",
        "testing_1", "nullarbor_1",
    ],
)  # fmt: skip
def test_ordinary_ids_pass_unchanged(value: str) -> None:
    assert validate_id(value, "user_id") is value


def meant_to_pass(text: str) -> bool:
    """The rules again, written from their text, one at a time."""
    if not 1 <= len(text) <= 256 or text != text.strip():
        return False
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "C" or (category[0] == "Z" and character != " ") or character in BLANK_GLYPHS:
            return False
        if any(first <= ord(character) <= last for first, last in DEFAULT_IGNORABLE):
            return False
    folded = text.casefold()
    if folded.startswith("anonymous_"):
        return False
    prefixes = tuple(f"{prefix}_" for prefix in [*PREFIXES, "test"])
    return len(text) >= 20 or not (folded in {p.lower() for p in PLACEHOLDERS} or folded.startswith(prefixes))


id_like = st.builds(
    "".join,
    st.lists(
        st.one_of(
            st.sampled_from([*PLACEHOLDERS, *PREFIXES, "_", "Test_", "anonymous_", " ", "x"]), st.text(max_size=9)
        )
    ),
)


@given(st.one_of(st.text(max_size=300), id_like))
def test_the_rules_as_a_whole(text: str) -> None:
    assert is_refused(text) is not meant_to_pass(text)
    if meant_to_pass(text):
        assert validate_id(text, "user_id") is text


@given(
    st.sampled_from(["", " ", "\n", "\u202e", "\u3164", "x" * 256]),
    st.sampled_from(["test_", "mock_", "anonymous_", ""]),
)
def test_the_value_is_never_in_the_message(bad: str, prefix: str) -> None:
    value = f"{prefix}s3cr3t{bad}"
    assume(not meant_to_pass(value))
    with pytest.raises(InvalidContextError) as caught:
        validate_id(value, "user_id")
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None


class HostileText(str):
    __slots__ = ()

    def _called(self, *_: object) -> NoReturn:
        raise AssertionError("a method of the subclass was called")

    __str__ = __repr__ = __len__ = __getitem__ = __iter__ = __eq__ = __hash__ = __contains__ = __format__ = _called  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    strip = isascii = isprintable = casefold = lower = startswith = partition = _called  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def test_a_subclass_of_str_becomes_a_str_and_none_of_its_methods_is_called() -> None:
    result = validate_id(HostileText("alice"), "user_id")
    assert type(result) is str
    assert result == "alice"
    assert rule_broken_by(HostileText("NONE")) == "is a placeholder"
    assert UnifiedIDManager().parse(HostileText(f"thread_{CORE}")).core == CORE


GENERATORS: dict[IDKind, Callable[[UnifiedIDManager], str]] = {
    "thread": UnifiedIDManager.generate_thread_id,
    "run": UnifiedIDManager.generate_run_id,
    "request": UnifiedIDManager.generate_request_id,
    "websocket": UnifiedIDManager.generate_websocket_client_id,
    "anonymous": UnifiedIDManager.generate_anonymous_id,
}
TIMED = [kind for kind in GENERATORS if kind != "anonymous"]
PATTERNS = {kind: rf"{kind}_[0-9a-f]{{32}}" for kind in GENERATORS} | {"run": r"run_thread_([0-9a-f]{32})_\1"}


@pytest.mark.parametrize("kind", GENERATORS)
def test_made_ids_have_their_form_and_their_kind(kind: IDKind) -> None:
    ids = UnifiedIDManager()
    made = GENERATORS[kind](ids)
    assert re.fullmatch(PATTERNS[kind], made)
    assert ids.parse(made).kind == kind
    assert [other for other in GENERATORS if ids.validate(made, other)] == [kind]
    assert ids.validate(made)


@pytest.mark.parametrize("kind", TIMED)
def test_made_ids_obey_the_rules_for_given_ones(kind: IDKind) -> None:
    made = GENERATORS[kind](UnifiedIDManager())
    assert validate_id(made, "id") is made


def test_a_made_anonymous_id_cannot_be_given_back() -> None:
    assert is_refused(UnifiedIDManager().generate_anonymous_id())


def test_an_anonymous_id_says_nothing_of_its_time() -> None:
    def no_clock() -> int:
        raise AssertionError("the clock was read")

    ids = UnifiedIDManager(clock_ns=no_clock)
    made = [ids.generate_anonymous_id() for _ in range(1000)]
    assert ids.parse(made[0]).created_at is None
    # Every bit varies: a constant or counted part would leave a column of digits with few values.
    assert {len(set(column)) for column in zip(*(i.removeprefix("anonymous_") for i in made), strict=True)} == {16}


def test_an_id_tells_when_it_was_made() -> None:
    ids = UnifiedIDManager(clock_ns=lambda: 1_795_348_800_123_456_789)
    assert ids.parse(ids.generate_request_id()).created_at == datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize("kind", TIMED)
@given(readings=st.lists(st.one_of(st.integers(-5, 5), st.integers(0, 2**63)), min_size=2, max_size=30))
@example(readings=[7] * 30)
@example(readings=list(range(30, 0, -1)))
def test_ids_of_a_kind_ascend_whatever_the_clock_does(kind: IDKind, readings: list[int]) -> None:
    ids = UnifiedIDManager(clock_ns=iter(readings).__next__)
    made = [GENERATORS[kind](ids) for _ in readings]
    assert all(earlier < later for earlier, later in pairwise(made))
    assert {len(i) for i in made} == {len(made[0])}


@pytest.mark.usefixtures("threads_switch_often")
def test_ids_ascend_across_threads_while_the_clock_stands_still() -> None:
    ids = UnifiedIDManager(clock_ns=lambda: 1000)
    barrier = threading.Barrier(4)
    made: list[list[Core]] = []

    def draw() -> None:
        barrier.wait()
        made.append([ids.generate_core() for _ in range(20_000)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cores == sorted(cores) for cores in made)
    # As many different instants: had two threads been given one, neither would come before the other.
    assert len({core >> 64 for cores in made for core in cores}) == 80_000


def test_an_id_can_be_made_while_the_same_thread_makes_one() -> None:
    # As a signal handler or a finaliser would that interrupts it.
    class Interrupting(int):
        def __le__(self, other: int) -> bool:
            readings.append(0)
            ids.generate_core()
            return int.__le__(self, other)

    readings: list[int] = [Interrupting(1)]
    ids = UnifiedIDManager(clock_ns=readings.pop)
    thread = threading.Thread(target=ids.generate_core, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_random_halves_never_repeat_across_refills() -> None:
    ids = UnifiedIDManager()
    assert len({ids.generate_core() % 2**64 for _ in range(1000)}) == 1000


def run_python(script: str) -> list[str]:
    # A fresh interpreter, since forking this one would copy whatever threads other tests have left in it; with this
    # one's path, so that it imports the same ucm_middleware.
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_process_does_not_repeat_its_parents_ids() -> None:
    parent, child, grandchild = (
        line.split()
        for line in run_python("""
import os
from ucm_middleware.ids import UnifiedIDManager
ids = UnifiedIDManager(clock_ns=lambda: 1)
ids.generate_core()
def draw():
    os.write(1, (" ".join(str(ids.generate_core()) for _ in range(50)) + "\\n").encode())
if (pid := os.fork()) == 0:
    ids.generate_core()
    if (pid := os.fork()) == 0:
        draw()
        os._exit(0)
    os.waitpid(pid, 0)
    draw()
    os._exit(0)
os.waitpid(pid, 0)
draw()
""")
    )
    halves = {int(core) % 2**64 for core in [*parent, *child, *grandchild]}
    assert len(halves) == 150


def test_a_process_with_the_number_of_a_dead_ancestor_inherits_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refills: list[int] = []

    def counted_urandom(size: int) -> bytes:
        refills.append(size)
        return os.urandom(size)

    monkeypatch.setattr("ucm_middleware.ids.urandom", counted_urandom)
    ids = UnifiedIDManager()
    for pid in (7, 7, 8, 7):
        monkeypatch.setattr("ucm_middleware.ids.getpid", lambda pid=pid: pid)
        ids.generate_core()
    assert len(refills) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_in_the_middle_of_making_an_id_leaves_the_child_able_to() -> None:
    (exit_code,) = run_python("""
import os, signal, threading
from ucm_middleware.ids import UnifiedIDManager
inside, release = threading.Event(), threading.Event()
class Slow(int):
    def __le__(self, other):
        inside.set()
        release.wait()
        return int.__le__(self, other)
ids = UnifiedIDManager(clock_ns=lambda: 1 if threading.current_thread() is threading.main_thread() else Slow(1))
thread = threading.Thread(target=ids.generate_core)
thread.start()
inside.wait()
if (pid := os.fork()) == 0:
    signal.alarm(20)
    ids.generate_core()
    os._exit(0)
_, status = os.waitpid(pid, 0)
release.set()
thread.join()
print(os.waitstatus_to_exitcode(status))
""")
    assert exit_code == "0"


thread_ids = st.one_of(
    st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" _"), min_size=1, max_size=219),
    st.sampled_from(["acme", "acme_x", "x_", "_", "__", "run", f"run_a_{CORE}", f"thread_{CORE}", f"a_{CORE}", CORE]),
).filter(lambda text: not is_refused(text))


@given(thread_ids)
def test_a_run_gives_its_thread_back_whatever_the_thread_is_called(thread_id: str) -> None:
    ids = UnifiedIDManager(clock_ns=lambda: 5_000)
    run_id = ids.generate_run_id(thread_id)
    assert ids.extract_thread_id(run_id) == thread_id
    assert ids.parse(run_id) == ParsedID("run", run_id[-32:], datetime(1970, 1, 1, 0, 0, 0, 5, tzinfo=UTC), thread_id)
    assert validate_id(run_id, "run_id") is run_id


def test_a_run_without_a_thread_and_its_new_thread_have_one_core() -> None:
    ids = UnifiedIDManager()
    parsed = ids.parse(ids.generate_run_id())
    assert parsed.thread_id == f"thread_{parsed.core}"


def test_a_run_of_too_long_a_thread_is_refused() -> None:
    ids = UnifiedIDManager()
    assert len(ids.generate_run_id("a" * 219)) == 256
    with pytest.raises(
        InvalidContextError, match=r"^thread_id: makes a run id of more than 256 .* at most 219 characters$"
    ):
        ids.generate_run_id("a" * 220)


@pytest.mark.parametrize("thread_id", ["", "null", "mock_1", "a\nb", "anonymous_1"])
def test_a_run_of_an_invalid_thread_is_refused(thread_id: str) -> None:
    ids = UnifiedIDManager()
    with pytest.raises(InvalidContextError, match=r"^thread_id: "):
        ids.generate_run_id(thread_id)
    assert not ids.validate(f"run_{thread_id}_{CORE}")


@pytest.mark.parametrize(
    "value",
    [
        None, 7, b"thread_" + CORE.encode(), "", "thread", "thread_", CORE, f"thread{CORE}", f"Thread_{CORE}",
        f"thread_{CORE.upper()}", f"thread_{CORE[:-1]}", f"thread_{CORE}0", f"thread_{CORE}\n", f" thread_{CORE}",
        f"thread_{CORE[:-1]}g", f"thread_{CORE[:-1]}\uff10", f"thread_0x{CORE[2:]}", f"thread_+{CORE[1:]}",
        f"x_thread_{CORE}", f"session_{CORE}", f"run_{CORE}", f"run__{CORE}", f"run_ _{CORE}", f"run_a_{CORE.upper()}",
        f"run_{'a' * 220}_{CORE}", f"RUN_a_{CORE}", "alice",
    ],
)  # fmt: skip
def test_what_was_not_made_here_is_not_parsed(value: object) -> None:
    ids = UnifiedIDManager()
    with pytest.raises(InvalidContextError):
        ids.parse(value)
    assert not ids.validate(value)


@given(st.text(max_size=300))
def test_parsing_text_answers_or_refuses(text: str) -> None:
    ids = UnifiedIDManager()
    for value in (text, f"run_{text}_{CORE}", f"thread_{text}"):
        if ids.validate(value):
            assert value.endswith(ids.parse(value).core)


@pytest.mark.parametrize("value", [f"thread_{CORE}", f"request_{CORE}", "alice"])
def test_only_a_run_has_a_thread_to_extract(value: str) -> None:
    with pytest.raises(InvalidContextError):
        UnifiedIDManager().extract_thread_id(value)
