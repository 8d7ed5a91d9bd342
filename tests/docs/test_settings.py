"""The page of settings is whole, and its program and its ids do what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs_site.markdown import blocks
from ucm_middleware.environment import Environment
from ucm_middleware.errors import ConfigurationError, InvalidContextError
from ucm_middleware.ids import MAX_LENGTH, PLACEHOLDER_PREFIXES, PLACEHOLDERS, SHORT_LENGTH, validate_id
from ucm_middleware.manager import UserContextManager

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "settings.md").read_text()

# Has the form of a variable, and is an attribute of plugins.
NO_VARIABLE = {"UCM_HOOK_API"}


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def sources() -> list[Path]:
    """What is installed: the package, its plugin of pytest, and each adapter."""
    return [
        ROOT / "_ucm_middleware_pytest.py",
        *(ROOT / "ucm_middleware").rglob("*.py"),
        *(ROOT / "adapters").glob("*/src/**/*.py"),
    ]


def test_every_variable_that_the_sources_name_is_on_the_page() -> None:
    files = sources()
    named = {name for file in files for name in re.findall(r"\b(?:UCM|OTEL)_[A-Z_]+\b", file.read_text())}
    # That it has looked into the adapters too.
    assert {"UCM_ENVIRONMENT", "OTEL_PYTHON_TRACER_PROVIDER", "UCM_POSTGRES_DSN", "UCM_MCP_USER"} <= named
    missing = named - NO_VARIABLE - quoted(section("Environment variables"))
    assert not missing, f"docs/reference/settings.md does not say what {sorted(missing)} are"


def test_the_page_names_no_variable_that_nobody_reads() -> None:
    text = "\n".join(file.read_text() for file in sources())
    for name in quoted(section("Environment variables")):
        if re.fullmatch(r"(?:UCM|OTEL)_[A-Z_]+", name):
            assert re.search(rf"\b{name}\b", text), name


def test_each_environment_is_named() -> None:
    assert set(Environment) <= quoted(section("Environment variables"))


def test_the_program_of_the_page_prints_what_stands_below_it(tmp_path: Path) -> None:
    expected = None
    for block in blocks(PAGE):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "text":
            expected = block.text
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCM_")}
    ran = subprocess.run(
        [sys.executable, "shop.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, expected), ran.stderr


@pytest.mark.parametrize("environment", [None, *Environment])
def test_production_alone_refuses_what_needs_a_secret(environment: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_SECRET", raising=False)
    if environment is None:
        monkeypatch.delenv("UCM_ENVIRONMENT")
    else:
        monkeypatch.setenv("UCM_ENVIRONMENT", environment)
    manager = UserContextManager()
    context = manager.create_isolated_context("alice")
    if environment in (None, "production"):
        with pytest.raises(ConfigurationError, match="UCM_SECRET is not set"):
            context.derive_key("thread", "1")
    else:
        assert context.derive_key("thread", "1")
    manager.cleanup_all_contexts()
    assert manager.census is not None
    assert manager.census.action == ("record" if environment in (None, "production") else "warn")
    if environment == "testing":
        assert validate_id("test_alice", "user_id") == "test_alice"
    else:
        with pytest.raises(InvalidContextError):
            validate_id("test_alice", "user_id")


def test_the_rules_for_ids_are_those_of_the_code() -> None:
    text = section("Ids")
    rules = re.findall(r"^- (has fewer than 20 characters.+?);$", text, re.MULTILINE | re.DOTALL)
    placeholders, prefixes, _ = rules
    assert quoted(placeholders) == PLACEHOLDERS
    assert quoted(prefixes) == PLACEHOLDER_PREFIXES
    assert f"more than {MAX_LENGTH} characters" in text
    assert text.count(f"fewer than {SHORT_LENGTH} characters") == 3


def test_the_ids_of_the_table_are_accepted_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCM_ENVIRONMENT")
    accepted, refused = [quoted(cell) for cell in section("Ids").rstrip().splitlines()[-1].strip("| ").split(" | ")]
    assert len(accepted) == len(refused) == 6
    for value in accepted:
        assert validate_id(value, "user_id") == value
    for value in refused:
        with pytest.raises(InvalidContextError):
            validate_id(value.strip('"').replace("\\n", "\n"), "user_id")
