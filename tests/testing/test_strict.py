"""``--ucm-strict``: what a test leaves behind fails it, in real sessions of pytest; and its clean twin passes."""

import textwrap
from dataclasses import dataclass

import pytest

PRELUDE = """
import asyncio, contextvars, gc, os, threading, unittest
import pytest
from ucm_middleware import UserContextManager, create_isolated_execution_context, managed_user_context

manager = UserContextManager()
kept = []

class Pool:
    def close(self): pass

class AsyncPool:
    async def aclose(self): pass
"""

SYNC = """
def test_{name}():
{body}
"""
ASYNCIO_AUTO = """
async def test_{name}():
{body}
"""
ASYNCIO_STRICT = """
@pytest.mark.asyncio
async def test_{name}():
{body}
"""
ANYIO = """
@pytest.mark.anyio
async def test_{name}():
{body}
"""
UNITTEST = """
class It_{name}(unittest.TestCase):
    def test_{name}(self):
    {body}
"""
UNITTEST_ASYNC = """
class It_{name}(unittest.IsolatedAsyncioTestCase):
    async def test_{name}(self):
    {body}
"""
ASYNC_FIXTURE = """
@pytest.fixture
async def it_{name}():
{body}

async def test_{name}(it_{name}): pass
"""


@dataclass(frozen=True)
class Kind:
    """A way to write tests: its template, and the options that it needs."""

    template: str
    options: tuple[str, ...] = ()


KINDS = {
    "sync": Kind(SYNC),
    "no asyncio plugin": Kind(SYNC, ("-p", "no:asyncio", "-p", "no:anyio")),
    "asyncio auto": Kind(ASYNCIO_AUTO, ("-o", "asyncio_mode=auto")),
    "asyncio strict": Kind(ASYNCIO_STRICT, ("-o", "asyncio_mode=strict")),
    "asyncio module loop": Kind(
        ASYNCIO_AUTO, ("-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=module")
    ),
    "async fixture": Kind(ASYNC_FIXTURE, ("-o", "asyncio_mode=auto")),
    "anyio": Kind(ANYIO, ("-p", "no:asyncio")),
    "unittest": Kind(UNITTEST),
    "async unittest": Kind(UNITTEST_ASYNC),
    "xdist": Kind(SYNC, ("-n", "2")),
    "xdist and asyncio auto": Kind(ASYNCIO_AUTO, ("-n", "2", "-o", "asyncio_mode=auto")),
    "xdist and asyncio strict": Kind(ASYNCIO_STRICT, ("-n", "2", "-o", "asyncio_mode=strict")),
    "xdist and async fixture": Kind(ASYNC_FIXTURE, ("-n", "2", "-o", "asyncio_mode=auto")),
    "xdist and anyio": Kind(ANYIO, ("-n", "2", "-p", "no:asyncio")),
    "xdist and anyio beside asyncio": Kind(ANYIO, ("-n", "2", "-o", "asyncio_mode=strict")),
}
ASYNCHRONOUS = [name for name in KINDS if "async" in KINDS[name].template]

# What is left behind, the clean twin, and what the report must say.
LEAKS = {
    "open": (
        "context = manager.create_isolated_context('alice')",
        "manager.create_isolated_context('alice').close()",
        r"a context open: context of user 'alice' \(request_\w+\), opened by .*test_\w+\.py:\d+$",
    ),
    "holding": (
        "manager.create_isolated_context('alice').closing(Pool(), name='the pool')",
        "context = manager.create_isolated_context('alice'); context.closing(Pool()); context.close()",
        r"a context open, holding the pool: context of user 'alice' .*test_\w+\.py:\d+$",
    ),
    "dropped": (
        "UserContextManager().create_isolated_context('alice'); gc.collect()",
        "UserContextManager().create_isolated_context('alice').close(); gc.collect()",
        r"a context dropped while open: context of user 'alice' .*test_\w+\.py:\d+$",
    ),
    "by_hand": (
        "kept.append(create_isolated_execution_context('alice'))",
        "kept.append(create_isolated_execution_context('alice')); kept.pop().close()",
        r"a context open: context of user 'alice'",
    ),
    "environment": (
        "os.environ.update(NEW='hunter2'); os.environ['OLD'] = 'hunter2'; del os.environ['GONE']",
        "patch = pytest.MonkeyPatch(); patch.setenv('OLD', 'hunter2'); patch.delenv('GONE'); patch.undo()",
        r"a changed environment, now put back: GONE \(removed\), NEW \(added\), OLD \(changed\)$",
    ),
    "unclosed": (
        "in_a_thread(hold, AsyncPool())",
        "in_a_thread(hold, Pool())",
        r"a context closed \(closed\) with unreleased resources: the pool \(unclosed\); context of user 'alice'",
    ),
    "thread": (
        "enter_and(start_a_thread)",
        "enter_and(run_a_thread)",
        r"a thread 'Thread-\d+.*' in .*\.waits, at .* that goes on in a closed context: context of user 'alice'",
    ),
    "generator": (
        "enter_and(start_generating)",
        "enter_and(list, generates())",
        r"a generator .*\.generates, at .*, kept in .*\.kept\[\d+\] that goes on in a closed context",
    ),
}
ASYNC_LEAKS = {
    "task": (
        "enter_and(start_a_task); await asyncio.sleep(0)",
        "enter_and(generates)",
        r"a task .*\.sleeps, at .* that goes on in a closed context: context of user 'alice'",
    ),
    "timer": (
        "enter_and(start_a_timer); await asyncio.sleep(0)",
        "enter_and(asyncio.get_running_loop().call_later, 3600, waits).cancel()",
        r"a timer .*\.waits, at .* that goes on in a closed context: context of user 'alice'",
    ),
    "still_closing": (
        (
            "context = manager.create_isolated_context('alice'); context.callback(asyncio.sleep, 3600);"
            " context.close('cleared')"
        ),
        (
            "context = manager.create_isolated_context('alice'); context.callback(asyncio.sleep, 0);"
            " context.close('cleared'); await context.lifetime.wait_closed()"
        ),
        r"a context (still closing \(cleared\)|closed \(cleared\) with unreleased resources: sleep \(cancelled\))",
    ),
    "timed_out": (
        (
            "context = manager.create_isolated_context('alice');"
            " context.closing(Slow(), name='the pool', timeout=0); await context.aclose()"
        ),
        (
            "context = manager.create_isolated_context('alice');"
            " context.closing(AsyncPool(), name='the pool', timeout=5); await context.aclose()"
        ),
        r"a context closed \(closed\) with unreleased resources: the pool \(timed out\); context of user 'alice'",
    ),
}
MORE = """
@pytest.fixture
def anyio_backend(): return "asyncio"

class Slow:
    async def aclose(self): await asyncio.sleep(3600)

def hold(pool):
    context = manager.create_isolated_context("alice")
    context.closing(pool, name="the pool")
    context.close()

gate = threading.Event()

def waits(): gate.wait()

async def sleeps(): await asyncio.sleep(3600)

def generates():
    own = contextvars.copy_context()
    yield own

def start_generating():
    generator = generates()
    next(generator)
    kept.append(generator)

def start_a_task(): kept.append(asyncio.create_task(sleeps()))

def start_a_timer(): asyncio.get_running_loop().call_later(3600, waits)

def start_a_thread(): threading.Thread(target=contextvars.copy_context().run, args=(waits,), daemon=True).start()

def run_a_thread(): in_a_thread(contextvars.copy_context().run, len, "")

def enter_and(function, *args):
    with managed_user_context(manager.create_isolated_context("alice")):
        return function(*args)

def in_a_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()
"""


def session(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    """Run this module, warnings being errors, and every option of pytest's strict mode on."""
    pytester.makefile(".toml", pytest="[pytest]\nstrict = true\nfilterwarnings = ['error']\n")
    pytester.makepyfile(textwrap.dedent(PRELUDE + MORE) + source)
    if "no:asyncio" not in options:  # it warns without this, which is an error here
        options += ("-o", "asyncio_default_fixture_loop_scope=function")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:timeout", *options, timeout=60)
    if "-n" in options:
        result.stdout.fnmatch_lines(["created: 2/2 workers"])
    return result


def written(kind: str, bodies: dict[str, str]) -> str:
    """A module with a test for each body."""
    template = KINDS[kind].template
    depth = "        " if "class" in template else "    "
    return "".join(
        template.replace("    {body}", "{body}").format(
            name=name, body=textwrap.indent(body.replace("; ", "\n"), depth)
        )
        for name, body in bodies.items()
    )


def leaks_for(kind: str) -> dict[str, tuple[str, str, str]]:
    return LEAKS | (ASYNC_LEAKS if kind in ASYNCHRONOUS else {})


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sessions find, and no setting of this one."""
    monkeypatch.setenv("OLD", "before")
    monkeypatch.setenv("GONE", "before")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_each_leak_fails_the_test_that_left_it_and_its_clean_twin_passes(pytester: pytest.Pytester, kind: str) -> None:
    leaks = leaks_for(kind)
    bodies: dict[str, str] = {}
    for name, (left, clean, _) in leaks.items():
        bodies |= {name: left, f"{name}_twin": clean}
    result = session(pytester, written(kind, bodies), "--ucm-strict", *KINDS[kind].options)
    result.assert_outcomes(passed=len(bodies), errors=len(leaks))  # one for each leak, so none for a twin
    for name, (_, _, told) in leaks.items():
        result.stdout.re_match_lines([rf".*--ucm-strict: test_{name} left behind", rf".*{told}"], consecutive=True)
    assert "hunter2" not in result.stdout.str()


def test_without_the_option_nothing_is_looked_at(pytester: pytest.Pytester) -> None:
    source = written("sync", {name: left for name, (left, _, _) in LEAKS.items()})
    session(pytester, source).assert_outcomes(passed=len(LEAKS))


def test_the_setting_does_as_the_option(pytester: pytest.Pytester) -> None:
    source = written("sync", {name: left for name, (left, _, _) in LEAKS.items()})
    session(pytester, source, "-o", "ucm_strict=true").assert_outcomes(passed=len(LEAKS), errors=len(LEAKS))


def test_what_is_left_on_purpose_fails_nothing_but_the_environment_still_counts(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PRELUDE
        + """
@pytest.mark.ucm_leaks("to see what becomes of it")
def test_meant(): kept.append(manager.create_isolated_context("alice"))

@pytest.mark.ucm_leaks(reason="to see what becomes of it")
def test_environment(): os.environ["UCM_LEFT"] = "1"

def test_the_next_one_is_not_blamed(): pass

def test_not_meant(): kept.append(manager.create_isolated_context("bob"))
"""
    )
    result = pytester.runpytest_subprocess("--ucm-strict", "--strict-markers", "-p", "no:xdist")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(["*test_environment left behind*", "*UCM_LEFT*", "*test_not_meant left behind*"])


@pytest.mark.parametrize("xdist", [("-p", "no:xdist"), ("-n", "2")], ids=["alone", "xdist"])
def test_leaving_something_on_purpose_wants_a_reason(pytester: pytest.Pytester, xdist: tuple[str, str]) -> None:
    pytester.makepyfile(PRELUDE + "\n@pytest.mark.ucm_leaks\ndef test_it(): pass\n\ndef test_other(): pass\n")
    result = pytester.runpytest_subprocess("--ucm-strict", *xdist)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*test_it: ucm_leaks wants a reason*"])
