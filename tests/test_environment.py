"""Configuration: where a value comes from, that bad files are named, and that an overlay reaches nothing else."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from ucm_middleware.environment import Environment, IsolatedEnvironment, process_environment
from ucm_middleware.errors import ConfigurationError, ContextIsolationError

SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def _in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_ENVIRONMENT", raising=False)


WriteFile = Callable[..., Path]


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    def write(content: str | bytes, name: str = "settings.env") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_the_environment_is_production_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_environment() is Environment.PRODUCTION
    monkeypatch.setenv("UCM_ENVIRONMENT", "")
    assert process_environment() is Environment.PRODUCTION


@pytest.mark.parametrize("name", ["production", "staging", "development", "testing"])
def test_the_environment_is_read_at_each_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process_environment()
    monkeypatch.setenv("UCM_ENVIRONMENT", name)
    assert process_environment() == name


@pytest.mark.parametrize("name", ["prod", "Testing", " testing", "test"])
def test_an_unknown_environment_is_refused_with_the_ones_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_ENVIRONMENT", name)
    with pytest.raises(ConfigurationError) as caught:
        process_environment()
    for part in ("UCM_ENVIRONMENT", repr(name), "production, staging, development, testing"):
        assert part in str(caught.value)
    with pytest.raises(ConfigurationError, match="UCM_ENVIRONMENT"):
        IsolatedEnvironment()


def test_later_files_win_over_earlier_ones_and_the_process_over_all(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_file("A=first\nB=first\nC=first\n", "first.env")
    second = write_file("B=second\nC=second\n", "second.env")
    monkeypatch.setenv("C", "process")
    monkeypatch.delenv("A", raising=False)
    monkeypatch.delenv("B", raising=False)
    env = IsolatedEnvironment([first, str(second)])
    assert [env.get(name) for name in "ABC"] == ["first", "second", "process"]
    assert {"A", "B", "C", *os.environ} == env.names()


@pytest.mark.parametrize("convert", [str, Path])
def test_one_file_needs_no_list(convert: Callable[[Path], str | Path], write_file: WriteFile) -> None:
    assert IsolatedEnvironment(convert(write_file("A=1")), environ={}).names() == {"A"}


def test_values_in_files_are_literal(write_file: WriteFile) -> None:
    file = write_file(
        "\ufeff# the settings\n\nexport URL='http://${HOME}/$A'\nA=1 # one\nQUOTED=\"two\\nlines\"\nEMPTY=\n"
    )
    env = IsolatedEnvironment(file, environ={"HOME": "/root"})
    assert {name: env.get(name) for name in env.names()} == {
        "HOME": "/root", "URL": "http://${HOME}/$A", "A": "1", "QUOTED": "two\nlines", "EMPTY": "",
    }  # fmt: skip


def test_a_given_mapping_takes_the_place_of_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_IN_THE_PROCESS", "1")
    assert IsolatedEnvironment(environ={"A": "1"}).names() == {"A"}
    assert IsolatedEnvironment(environ={}).names() == frozenset()


def test_the_root_is_a_snapshot(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "before")
    given = {"A": "before"}
    file = write_file("B=before")
    roots = [IsolatedEnvironment(file), IsolatedEnvironment(file, environ=given)]
    monkeypatch.setenv("A", "after")
    given["A"] = "after"
    write_file("B=after")
    assert [(env.get("A"), env.get("B")) for env in roots] == [("before", "before")] * 2


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (f"A=1\nPASSWORD='{SECRET}\n", 2),
        (f'A=1\n\n\nPASSWORD="{SECRET}\nB=2\n', 4),
        (f"A=1\r\n\r\nPASSWORD {SECRET}\r\n", 3),
        (f"\n{SECRET}\nA=1\n", 2),
        (f"={SECRET}", 1),
        (f"A=1\n'B=C'={SECRET}", 2),
        (f"A=1\nB={SECRET}\0", 2),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_line_without_its_content(
    content: str, line: int, write_file: WriteFile
) -> None:
    file = write_file(content)
    with pytest.raises(ConfigurationError) as caught:
        IsolatedEnvironment(file, environ={})
    assert f"{file}, line {line}:" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_is_not_text_is_refused_and_its_content_hangs_on_nothing(write_file: WriteFile) -> None:
    file = write_file(f"A={SECRET}\n".encode() + b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8") as caught:
        IsolatedEnvironment(file)
    assert str(file) in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path: Path, write_file: WriteFile) -> None:
    good = write_file("A=1")
    for bad in (tmp_path / "missing.env", tmp_path):
        with pytest.raises(ConfigurationError) as caught:
            IsolatedEnvironment([good, bad])
        assert f"{bad} cannot be read" in str(caught.value)


def test_the_environment_may_be_named_in_a_file_and_the_process_wins(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file("UCM_ENVIRONMENT=development")
    env = IsolatedEnvironment(file)
    assert env.environment is Environment.DEVELOPMENT
    assert not env.is_production
    assert process_environment() is Environment.PRODUCTION
    monkeypatch.setenv("UCM_ENVIRONMENT", "staging")
    assert IsolatedEnvironment(file).environment is Environment.STAGING
    assert IsolatedEnvironment(environ={}).is_production


def test_no_overlay_changes_the_environment() -> None:
    root = IsolatedEnvironment(environ={"UCM_ENVIRONMENT": "staging"})
    overlay = root.overlay().overlay()
    assert overlay.environment is Environment.STAGING
    with pytest.raises(ConfigurationError, match="UCM_ENVIRONMENT holds for the whole process"):
        overlay.set("UCM_ENVIRONMENT", "testing")
    with pytest.raises(ConfigurationError, match="UCM_ENVIRONMENT"):
        overlay.unset("UCM_ENVIRONMENT")
    with pytest.raises(ConfigurationError, match="UCM_ENVIRONMENT"):
        root.overlay({"UCM_ENVIRONMENT": "testing"})
    assert overlay.get("UCM_ENVIRONMENT") == "staging"


WRITES: dict[str, Callable[[IsolatedEnvironment], None]] = {
    "set": lambda env: env.set("A", "2"),
    "unset": lambda env: env.unset("A"),
    "clear": lambda env: env.clear(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_the_root_cannot_be_changed(write: Callable[[IsolatedEnvironment], None]) -> None:
    root = IsolatedEnvironment(environ={"A": "1"})
    with pytest.raises(ContextIsolationError, match=r"overlay\(\)"):
        write(root)
    assert root.get("A") == "1"


def test_a_missing_or_empty_setting_that_is_required_is_named() -> None:
    env = IsolatedEnvironment(environ={"EMPTY": "", "A": "1"})
    assert env.require("A") == "1"
    with pytest.raises(ConfigurationError, match=r"^EMPTY is empty; set it"):
        env.require("EMPTY")
    with pytest.raises(ConfigurationError, match=r"^MISSING is not set; set it"):
        env.require("MISSING")


def test_reading() -> None:
    env = IsolatedEnvironment(environ={"EMPTY": "", "A": "1"}).overlay()
    env.unset("A")
    assert (env.get("EMPTY"), env.get("EMPTY", "other")) == ("", "")
    assert (env.get("A"), env.get("A", "other")) == (None, "other")
    assert (env.get("MISSING"), env.get("MISSING", "other")) == (None, "other")
    assert [name in env for name in ("EMPTY", "A", "MISSING")] == [True, False, False]


@pytest.mark.parametrize("name", ["", "A=B", "A\0", None, 7])
def test_what_cannot_name_a_setting_is_refused(name: str) -> None:
    overlay = IsolatedEnvironment(environ={}).overlay()
    with pytest.raises(ConfigurationError, match="name"):
        overlay.set(name, "1")
    with pytest.raises(ConfigurationError, match="name"):
        overlay.unset(name)
    with pytest.raises(ConfigurationError, match="name"):
        IsolatedEnvironment(environ={name: "1"})
    assert overlay.names() == frozenset()


@pytest.mark.parametrize("value", [f"{SECRET}\0", None, 7, SECRET.encode()])
def test_values_that_are_not_text_are_refused_by_the_name_of_the_setting(value: str) -> None:
    root = IsolatedEnvironment(environ={})
    for write in (
        lambda: root.overlay().set("PASSWORD", value),
        lambda: root.overlay({"PASSWORD": value}),
        lambda: IsolatedEnvironment(environ={"PASSWORD": value}),
    ):
        with pytest.raises(ConfigurationError, match="'PASSWORD'") as caught:
            write()
        assert SECRET not in str(caught.value)


def test_clearing_an_overlay_shows_what_it_lies_on() -> None:
    middle = IsolatedEnvironment(environ={"A": "root", "B": "root"}).overlay({"A": "middle"})
    top = middle.overlay({"A": "top", "C": "top"})
    top.unset("B")
    top.clear()
    assert {name: top.get(name) for name in top.names()} == {"A": "middle", "B": "root"}
    top.set("A", "again")
    assert (top.get("A"), middle.get("A")) == ("again", "middle")


def test_the_mapping_an_overlay_was_made_from_stays_apart() -> None:
    values = {"A": "1"}
    overlay = IsolatedEnvironment(environ={}).overlay(values)
    overlay.set("A", "2")
    values["B"] = "1"
    assert values["A"] == "1"
    assert overlay.names() == {"A"}


def test_the_representation_has_names_and_no_values() -> None:
    root = IsolatedEnvironment(environ={"PASSWORD": SECRET, "A": SECRET})
    overlay = root.overlay({"TOKEN": SECRET})
    assert repr(root) == "<IsolatedEnvironment production: 2 names>"
    assert repr(overlay) == "<IsolatedEnvironment production: overlay of ['TOKEN']>"
    assert SECRET not in f"{root} {overlay}"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_of_an_overlay_is_independent(duplicate: Callable[[IsolatedEnvironment], IsolatedEnvironment]) -> None:
    root = IsolatedEnvironment(environ={"A": "root"})
    original = root.overlay({"A": "1", "B": "1"})
    original.unset("C")
    twin = duplicate(original)
    twin.set("A", "2")
    original.set("B", "3")
    assert [(env.get("A"), env.get("B")) for env in (original, twin)] == [("1", "3"), ("2", "1")]
    assert duplicate(root) is root


def test_a_deep_copy_does_not_follow_the_overlays_below_it() -> None:
    middle = IsolatedEnvironment(environ={}).overlay({"A": "1"})
    shallow, deep = copy.copy(middle.overlay()), copy.deepcopy(middle.overlay())
    middle.set("A", "2")
    assert (shallow.get("A"), deep.get("A")) == ("2", "1")


def test_settings_are_not_pickled() -> None:
    root = IsolatedEnvironment(environ={"PASSWORD": SECRET})
    for env in (root, root.overlay()):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(env)


def test_names_can_be_listed_while_another_thread_writes() -> None:
    class Meddling(str):
        """A name whose hash, taken when names() collects it, lets a write come in between as another thread's may."""

        __slots__ = ()

        def __hash__(self) -> int:
            if meddle:
                overlay.set("NEW", "1")
            return str.__hash__(self)

    meddle = False
    overlay = IsolatedEnvironment(environ={}).overlay({Meddling("A"): "1", Meddling("B"): "1"})
    meddle = True
    assert overlay.names() == {"A", "B"}
    assert "NEW" in overlay


NAMES = st.sampled_from(["A", "B", "C", "PATH"])
VALUES = st.sampled_from(["", "1", "2"])


@settings(max_examples=60, stateful_step_count=30, deadline=None)
class Overlays(RuleBasedStateMachine):
    """A tree of overlays beside a model of each: what it wrote itself, and the overlay it lies on."""

    layers = Bundle[int]("layers")

    def __init__(self) -> None:
        super().__init__()
        self.process = dict(os.environ)
        self.environments: list[IsolatedEnvironment] = []
        self.written: list[dict[str, str | None]] = []
        self.parents: list[int | None] = []

    def added(self, environment: IsolatedEnvironment, parent: int | None, written: dict[str, str | None]) -> int:
        self.environments.append(environment)
        self.parents.append(parent)
        self.written.append(written)
        return len(self.environments) - 1

    def expected(self, layer: int) -> dict[str, str | None]:
        parent = self.parents[layer]
        return (self.expected(parent) if parent is not None else {}) | self.written[layer]

    @initialize(target=layers, values=st.dictionaries(NAMES, VALUES))
    def root(self, values: dict[str, str]) -> int:
        root = self.added(IsolatedEnvironment(environ=values), None, dict(values))
        return self.added(self.environments[root].overlay(), root, {})

    @rule(target=layers, below=layers, values=st.dictionaries(NAMES, VALUES))
    def overlay(self, below: int, values: dict[str, str]) -> int:
        return self.added(self.environments[below].overlay(values), below, dict(values))

    @rule(target=layers, layer=layers)
    def duplicate(self, layer: int) -> int:
        return self.added(copy.copy(self.environments[layer]), self.parents[layer], dict(self.written[layer]))

    @rule(layer=layers, name=NAMES, value=VALUES)
    def set(self, layer: int, name: str, value: str) -> None:
        self.environments[layer].set(name, value)
        self.written[layer][name] = value

    @rule(layer=layers, name=NAMES)
    def unset(self, layer: int, name: str) -> None:
        self.environments[layer].unset(name)
        self.written[layer][name] = None

    @rule(layer=layers)
    def clear(self, layer: int) -> None:
        self.environments[layer].clear()
        self.written[layer].clear()

    @invariant()
    def each_shows_its_own_writes_over_those_below(self) -> None:
        for layer, environment in enumerate(self.environments):
            expected = {name: value for name, value in self.expected(layer).items() if value is not None}
            assert environment.names() == expected.keys()
            assert {name: environment.get(name) for name in expected} == expected

    @invariant()
    def the_process_is_untouched(self) -> None:
        assert dict(os.environ) == self.process


TestOverlays = Overlays.TestCase
