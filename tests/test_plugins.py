"""Loading plugins: only those that are named, from real distributions, and each that is wrong refused by name."""

import importlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from support.distributions import Shelf
from ucm_middleware import (
    ConfigurationError,
    IsolatedEnvironment,
    PluginError,
    UserExecutionContext,
    create_isolated_execution_context,
    hookimpl,
)
from ucm_middleware.dispatch import Hooks
from ucm_middleware.hooks import API_VERSION
from ucm_middleware.plugins import load_hooks

JOURNAL = """
    from ucm_middleware import hookimpl

    opened = []

    @hookimpl
    def ucm_context_opened(context):
        opened.append(context.user_id)
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """A folder on sys.path. What is imported from it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    shelf = Shelf(tmp_path)
    yield shelf
    for module in shelf.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def context() -> Iterator[UserExecutionContext]:
    context = create_isolated_execution_context("alice", "r-1")
    yield context
    context.close()


def load(*plugins: object, **environ: str) -> Hooks:
    return load_hooks(plugins, IsolatedEnvironment(environ=environ))


def imported(module: str) -> bool:
    return module in sys.modules


def opened(module: str) -> list[str]:
    """What the journal of this module has noted."""
    noted: list[str] = importlib.import_module(module).opened
    return noted


class TestWhatIsLoaded:
    def test_an_entry_point_that_code_names(self, shelf: Shelf, context: UserExecutionContext) -> None:
        shelf.install("ucm-journal", JOURNAL)
        load("journal").context_opened(context)
        assert opened("ucm_journal") == ["alice"]

    def test_an_object_behind_an_entry_point(self, shelf: Shelf, context: UserExecutionContext) -> None:
        code = """
            from ucm_middleware import hookimpl

            opened = []

            class Journal:
                @hookimpl
                def ucm_context_opened(self, context):
                    opened.append(context.user_id)

            journal = Journal()
        """
        shelf.install("ucm-journal", code, entry_points={"journal": "ucm_journal:journal"})
        load("journal").context_opened(context)
        assert opened("ucm_journal") == ["alice"]

    def test_a_module_that_code_gives(self, shelf: Shelf, context: UserExecutionContext) -> None:
        shelf.install("ucm-journal", JOURNAL)
        load(importlib.import_module("ucm_journal")).context_opened(context)
        assert opened("ucm_journal") == ["alice"]

    def test_entry_points_that_the_environment_names(self, shelf: Shelf, context: UserExecutionContext) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-diary", JOURNAL)
        load(UCM_PLUGINS=" diary, journal ,,diary,").context_opened(context)
        assert opened("ucm_journal") == opened("ucm_diary") == ["alice"]

    def test_what_both_name_is_loaded_once(self, shelf: Shelf, context: UserExecutionContext) -> None:
        shelf.install("ucm-journal", JOURNAL)
        load("journal", UCM_PLUGINS="journal").context_opened(context)
        assert opened("ucm_journal") == ["alice"]

    def test_what_code_names_comes_before_what_the_environment_names(
        self, shelf: Shelf, context: UserExecutionContext
    ) -> None:
        keys = "from ucm_middleware import hookimpl\n\n@hookimpl\ndef ucm_derive_key():\n    return __name__\n"
        for name in ("ucm-a", "ucm-b"):
            shelf.install(name, keys)
        assert load("b", UCM_PLUGINS="a").derive_key(context, "thread", "1") == "ucm_b"
        assert load(UCM_PLUGINS="a,b").derive_key(context, "thread", "1") == "ucm_a"

    @pytest.mark.security
    def test_nothing_that_nobody_names(self, shelf: Shelf, context: UserExecutionContext) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-diary", JOURNAL)
        load().context_opened(context)
        load("diary").context_opened(context)
        assert not imported("ucm_journal")
        assert opened("ucm_diary") == ["alice"]

    @pytest.mark.security
    def test_the_process_s_environment_counts_only_through_the_manager_s(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf.install("ucm-journal", JOURNAL)
        monkeypatch.setenv("UCM_PLUGINS", "journal")
        load()
        assert not imported("ucm_journal")

    @pytest.mark.parametrize("value", ["1", "0", "false"])
    def test_autoload_switched_off(self, shelf: Shelf, context: UserExecutionContext, value: str) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-diary", JOURNAL)
        load("diary", UCM_PLUGINS="journal,diary", UCM_DISABLE_PLUGIN_AUTOLOAD=value).context_opened(context)
        assert not imported("ucm_journal")
        assert opened("ucm_diary") == ["alice"]

    def test_an_empty_switch_switches_nothing_off(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL)
        load(UCM_PLUGINS="journal", UCM_DISABLE_PLUGIN_AUTOLOAD="")
        assert imported("ucm_journal")


class TestWhatIsLeftOut:
    def test_is_told_once_with_how_to_load_it(self, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-diary", JOURNAL, version="3.1")
        with caplog.at_level(logging.INFO, "ucm_middleware"):
            load("journal")
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        told = record.getMessage()
        assert "diary (ucm-diary 3.1)" in told
        assert "UserContextManager(plugins=[...])" in told
        assert "UCM_PLUGINS" in told
        assert "ucm-journal" not in told

    def test_is_not_told_when_there_is_nothing(self, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
        shelf.install("ucm-journal", JOURNAL)
        with caplog.at_level(logging.INFO, "ucm_middleware"):
            load("journal")
        assert [record for record in caplog.records if "ucm-journal" in record.getMessage()] == []


def refused(*plugins: object, **environ: str) -> PluginError:
    with pytest.raises(PluginError) as raised:
        load(*plugins, **environ)
    return raised.value


class TestRefusedDistributions:
    """Each error names the entry point, the distribution with its version, what was found, and the remedy."""

    def test_one_that_is_not_installed(self, shelf: Shelf) -> None:
        shelf.install("ucm-diary", JOURNAL)
        for error in (refused("journal"), refused(UCM_PLUGINS="journal")):
            assert (error.plugin, error.distribution) == ("journal", "")
            assert "no installed distribution has an entry point of this name" in str(error)
            assert "diary" in error.remedy.partition("installed: ")[2].split(", ")

    def test_one_that_is_installed_and_given_as_an_object(self, shelf: Shelf) -> None:
        shelf.install("ucm-big-journal", JOURNAL, entry_points={})
        for error in (refused("big_journal"), refused(UCM_PLUGINS="big_journal")):
            assert str(error) == (
                "plugin 'big_journal' (ucm-big-journal 1.5): is installed, but is no plugin by name; "
                "give an object of its own, such as plugins=[SQLAlchemy(engine)], and take the name out of UCM_PLUGINS"
            )

    def test_one_that_is_installed_under_another_name(self, shelf: Shelf) -> None:
        shelf.install("ucm-big-journal", JOURNAL, entry_points={"big-journal": "ucm_big_journal"})
        assert "installed: big-journal" in refused("big_journal").remedy

    @pytest.mark.parametrize(
        ("code", "found"),
        [
            ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("def", "SyntaxError: invalid syntax"),
            ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ],
    )
    def test_one_that_fails_to_import(self, shelf: Shelf, code: str, found: str) -> None:
        shelf.install("ucm-journal", code)
        error = refused("journal")
        assert (error.plugin, error.distribution) == ("journal", "ucm-journal 1.5")
        assert f"its entry point 'ucm_journal' could not be imported: {found}" in str(error)
        assert error.remedy == "install what it needs, or take it out of plugins= and UCM_PLUGINS"
        assert error.__cause__ is not None

    def test_one_whose_entry_point_leads_nowhere(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL, entry_points={"journal": "ucm_journal:missing"})
        assert "AttributeError" in str(refused("journal"))

    @pytest.mark.parametrize("value", ["None", "type('Journal', (), {})"])
    def test_one_whose_entry_point_is_no_plugin(self, shelf: Shelf, value: str) -> None:
        shelf.install("ucm-journal", f"plugin = {value}", entry_points={"journal": "ucm_journal:plugin"})
        error = refused("journal")
        assert (error.distribution, error.remedy) == ("ucm-journal 1.5", "a plugin is a module or an instance")

    @pytest.mark.security
    def test_one_name_offered_by_two(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-impostor", JOURNAL, entry_points={"journal": "ucm_impostor"})
        error = refused("journal")
        assert set(error.distribution.split(", ")) == {"ucm-journal 1.5", "ucm-impostor 1.5"}
        assert not imported("ucm_journal")
        assert not imported("ucm_impostor")

    @pytest.mark.parametrize("requirement", ["ucm-middleware<0.0.1", "UCM_Middleware >=99", "ucm-middleware==0.0.5"])
    def test_one_for_another_core_is_not_even_imported(self, shelf: Shelf, requirement: str) -> None:
        shelf.install("ucm-journal", JOURNAL, requires=["httpx>=0.1", requirement])
        error = refused("journal")
        assert error.distribution == "ucm-journal 1.5"
        assert error.problem.startswith("it requires ucm-middleware")
        assert "install a version of the plugin for ucm-middleware" in error.remedy
        assert not imported("ucm_journal")

    @pytest.mark.parametrize(
        "requirement",
        ["ucm-middleware>=0.0.1", "ucm-middleware", "ucm-middleware<0.0.1; extra == 'old'", "another<0.0.1"],
    )
    def test_one_for_this_core_is_welcome(self, shelf: Shelf, requirement: str) -> None:
        shelf.install("ucm-journal", JOURNAL, requires=[requirement])
        assert load("journal").context_opened

    def test_one_whose_requirements_cannot_be_read(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL, requires=["ucm-middleware (oh no"])
        assert "a requirement that cannot be read" in str(refused("journal"))

    @pytest.mark.parametrize(
        ("declared", "found"),
        [
            (API_VERSION - 1, f"it is too old: written for version {API_VERSION - 1} of the hooks"),
            (API_VERSION + 1, f"it is too new: written for version {API_VERSION + 1} of the hooks"),
            ("1", "its UCM_HOOK_API is '1'"),
            (True, "its UCM_HOOK_API is True"),
            (None, "its UCM_HOOK_API is None"),
        ],
    )
    def test_one_for_another_version_of_the_hooks(self, shelf: Shelf, declared: object, found: str) -> None:
        shelf.install("ucm-journal", f"{JOURNAL}\n    UCM_HOOK_API = {declared!r}\n")
        error = refused("journal")
        assert error.distribution == "ucm-journal 1.5"
        assert found in str(error)

    def test_one_for_this_version_of_the_hooks_is_welcome(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", f"{JOURNAL}\n    UCM_HOOK_API = {API_VERSION}\n")
        assert load("journal").context_opened

    def test_one_that_is_also_given_as_a_module(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL)
        module = importlib.import_module("ucm_journal")
        assert "it is given twice" in str(refused("journal", module))
        assert "it is given twice" in str(refused(module, module))
        assert "it is given twice" in str(refused("journal", "journal"))

    def test_a_module_in_code_is_named_with_its_distribution(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", "def ucm_identify(connection): return 'alice'")
        error = refused(importlib.import_module("ucm_journal"))
        assert (error.plugin, error.distribution) == ("ucm_journal", "ucm-journal 1.5")


class TestRefusedImplementations:
    @pytest.mark.parametrize(
        ("code", "found", "remedy"),
        [
            (
                "def ucm_identify(connection): return 'alice'",
                "its ucm_identify is not a function with @hookimpl, so it would never be called",
                "put @hookimpl from ucm_middleware on it",
            ),
            ("x = 1", "it implements no hook", "put @hookimpl from ucm_middleware on its functions"),
            (
                "@hookimpl\ndef ucm_identfy(connection): return 'alice'",
                "its ucm_identfy implements ucm_identfy, which is no hook",
                "the hooks are ucm_identify, ucm_derive_key",
            ),
            (
                "@hookimpl\ndef _private(connection): return 'alice'",
                "its _private implements _private, which is no hook",
                "correct the name",
            ),
            (
                "@hookimpl(specname='ucm_whoami')\ndef ucm_identify(connection): return 'alice'",
                "its ucm_identify implements ucm_whoami, which is no hook",
                "correct the name",
            ),
            (
                "@hookimpl\ndef ucm_identify(request): return 'alice'",
                "Argument(s) {'request'} are declared in the hookimpl but can not be found in the hookspec",
                "correct the implementation",
            ),
            (
                "@hookimpl\ndef ucm_identify(*args): return 'alice'",
                "its ucm_identify takes *args, which is never given",
                "name, as ordinary arguments, those it wants of: connection",
            ),
            (
                "@hookimpl\ndef ucm_identify(**kwargs): return 'alice'",
                "its ucm_identify takes **kwargs, which is never given",
                "those it wants of: connection",
            ),
            (
                "@hookimpl\ndef ucm_derive_key(*, kind): return 'alice'",
                "its ucm_derive_key takes kind, which is never given",
                "those it wants of: context, kind, client_id",
            ),
            (
                "@hookimpl(wrapper=True)\ndef ucm_identify(connection): return (yield)",
                "its ucm_identify is a wrapper",
                "the ucm_around_ hooks are there to wrap",
            ),
            (
                "@hookimpl(hookwrapper=True)\ndef ucm_context_opened(context): yield",
                "its ucm_context_opened is a wrapper",
                "the ucm_around_ hooks are there to wrap",
            ),
            (
                "@hookimpl\nasync def ucm_bind_session(session): pass",
                "its ucm_bind_session is a coroutine function",
                "this hook is called where nothing can wait, and is declared with def",
            ),
            (
                "@hookimpl\nasync def ucm_derive_key(): return 'key'",
                "its ucm_derive_key is a coroutine function",
                "this hook is called where nothing can wait, and is declared with def",
            ),
            (
                "@hookimpl\nasync def ucm_context_closed(reason): pass",
                "its ucm_context_closed is a coroutine function",
                "this hook is called where nothing can wait, and is declared with def",
            ),
            (
                "@hookimpl\nasync def ucm_around_context(context): pass",
                "its ucm_around_context is a coroutine function",
                "this hook returns an asynchronous context manager, and is declared with def",
            ),
            (
                "@hookimpl\nasync def ucm_around_context(context): yield",
                "its ucm_around_context is a generator",
                "decorate it with contextlib.asynccontextmanager",
            ),
            (
                "@hookimpl\ndef ucm_around_context(context): yield",
                "its ucm_around_context is a generator",
                "decorate it with contextlib.asynccontextmanager",
            ),
            (
                "@hookimpl\nasync def ucm_identify(): yield 'alice'",
                "its ucm_identify is a generator",
                "return instead of yielding",
            ),
        ],
    )
    def test_what_would_not_do_what_it_says(self, shelf: Shelf, code: str, found: str, remedy: str) -> None:
        shelf.install("ucm-journal", f"from ucm_middleware import hookimpl\n{code}\n")
        for error in (refused("journal"), refused(UCM_PLUGINS="journal")):
            assert (error.plugin, error.distribution) == ("journal", "ucm-journal 1.5")
            assert found in error.problem
            assert remedy in error.remedy

    def test_one_hook_too_many_leaves_the_good_ones_out_too(self, shelf: Shelf) -> None:
        shelf.install("ucm-journal", JOURNAL)
        shelf.install("ucm-diary", "from ucm_middleware import hookimpl\n@hookimpl\ndef ucm_nothing(): pass\n")
        assert refused("journal", "diary").plugin == "diary"

    def test_a_hook_of_a_later_version_may_be_marked_optional(self, context: UserExecutionContext) -> None:
        class Ahead:
            @hookimpl(optionalhook=True)
            def ucm_of_the_future(self, whatever: object) -> None:
                raise AssertionError("nobody calls this")

            @hookimpl
            def ucm_derive_key(self) -> str:
                return "key"

        assert load(Ahead()).derive_key(context, "thread", "1") == "key"

    def test_an_object_that_cannot_be_looked_at(self) -> None:
        class Sealed:
            def __dir__(self) -> list[str]:
                raise RuntimeError("sealed")

        error = refused(Sealed())
        assert error.plugin.endswith("Sealed")
        assert error.problem == "looking at its hooks raised RuntimeError: sealed"

    def test_properties_are_not_evaluated(self) -> None:
        class Lazy:
            @property
            def connection(self) -> object:
                raise AssertionError("evaluated")

            @hookimpl
            def ucm_derive_key(self) -> str:
                return "key"

        assert load(Lazy()).derive_key

    def test_a_decorated_asynchronous_generator_is_welcome(self, context: UserExecutionContext) -> None:
        class Wraps:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self, context: UserExecutionContext) -> AsyncIterator[None]:
                yield

        assert len(load(Wraps()).around_context(context)) == 1


@pytest.mark.parametrize("plugins", ["journal", 7, None, {"journal"}, {"journal": 1}])
def test_what_is_no_list_of_plugins_is_refused(plugins: Any) -> None:
    with pytest.raises(ConfigurationError, match="plugins must be a list"):
        load_hooks(plugins, IsolatedEnvironment(environ={}))


@pytest.mark.parametrize("item", ["", None, dict])
def test_what_is_no_plugin_is_refused(item: object) -> None:
    with pytest.raises(ConfigurationError, match="plugins holds "):
        load(item)


def test_the_list_given_is_left_as_it_was(shelf: Shelf) -> None:
    shelf.install("ucm-journal", JOURNAL)
    given: list[object] = []
    load_hooks(given, IsolatedEnvironment(environ={"UCM_PLUGINS": "journal"}))
    assert given == []


def test_a_plugin_may_import_the_package_that_is_loading_it(shelf: Shelf) -> None:
    """In a process of its own, where nothing has been imported yet."""
    shelf.install("ucm-journal", JOURNAL)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ucm_journal; "
        "from ucm_middleware import IsolatedEnvironment; from ucm_middleware.plugins import load_hooks; "
        "print(bool(load_hooks(['journal'], IsolatedEnvironment(environ={})).context_opened))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(shelf.folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "True"
