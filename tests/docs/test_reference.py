"""Every public name has a place in the reference, and every place a name."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from docs_site.commands import MARK, commands
from docs_site.layout import site_pages
from docs_site.markdown import blocks

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"

PLACES = [
    name
    for page in sorted(REFERENCE.rglob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def defined(module: str) -> set[str]:
    """The names that a module without `__all__` makes itself, and does not begin with an underscore."""
    source = Path(str(import_module(module).__file__)).read_text()
    made = set[str]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Assign):
            made |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in made if not name.startswith("_")}


@pytest.mark.parametrize(
    "module",
    [
        "ucm_middleware",
        "ucm_middleware.audit",
        "ucm_middleware.certify",
        "ucm_middleware.testing",
        "ucm_middleware.websocket.websockets",
    ],
)
def test_every_exported_name_has_a_place(module: str) -> None:
    missing = {f"{module}.{name}" for name in import_module(module).__all__} - set(PLACES)
    assert not missing, f"no page of docs/reference/api has ::: for {sorted(missing)}"


@pytest.mark.parametrize("module", ["ucm_middleware.fastapi", "ucm_middleware.websocket.starlette"])
def test_every_name_of_modules_that_export_all_they_make_has_a_place(module: str) -> None:
    assert {f"{module}.{name}" for name in defined(module)} <= set(PLACES)


def test_every_fixture_has_a_place() -> None:
    module = "_ucm_middleware_pytest"
    fixtures = {f"{module}.{name}" for name in defined(module) if name.startswith("ucm_")}
    assert len(fixtures) >= 6
    assert fixtures <= set(PLACES)


def test_every_hook_is_on_the_page_of_the_hooks() -> None:
    """The page shows what the module has under the prefix that hooks have."""
    page = (REFERENCE / "api" / "hooks.md").read_text()
    assert 'filters: ["^ucm_"]' in page.partition("::: ucm_middleware.hooks\n")[2]


def test_no_name_has_two_places_and_each_is_there() -> None:
    assert len(PLACES) == len(set(PLACES))
    for name in PLACES:
        try:
            import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), name


def test_what_the_pages_import_has_a_place() -> None:
    """A name that a guide or the README takes from the package can be looked up."""
    names = {place.rpartition(".")[2] for place in PLACES}
    for page in site_pages(ROOT):
        if page.startswith(("docs/", "README")) and page.endswith(".md"):
            for block in blocks((ROOT / page).read_text()):
                if block.language == "python":
                    for found in re.findall(
                        r"^ *from ucm_middleware[\w.]* import ([\w, ]+)$", block.text, re.MULTILINE
                    ):
                        assert set(found.replace(" ", "").split(",")) <= names, f"{page}: {found}"


def test_every_command_is_described_with_what_it_takes() -> None:
    assert (REFERENCE / "command-line.md").read_text().count(MARK) == 1
    text = commands()
    for command in ("verify", "checkpoint", "keygen", "show", "export", "erase"):
        assert f"### ucm audit {command}\n" in text
    assert "## ucm doctor\n" in text
    assert "| `--checkpoints` | A file of checkpoints" in text
    assert "ucm audit verify [OPTIONS] LEDGER..." in text
