"""``--ucm-strict`` and what outlives one test: wider fixtures, threads that are still at it, tests that fail anyway."""

import pytest

from ucm_middleware.testing.context_watch import SETTLING

PRELUDE = """
import asyncio, os, threading
import pytest
from ucm_middleware import ContextLimitError, UserContextManager, create_isolated_execution_context
from ucm_middleware.testing import context_watch

manager = UserContextManager(max_contexts_per_user=2)
at_import = manager.create_isolated_context("of the import")
"""


def session(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    pytester.makefile(".toml", pytest="[pytest]\nstrict = true\nfilterwarnings = ['error']\n")
    pytester.makepyfile(PRELUDE + source)
    return pytester.runpytest_subprocess("--ucm-strict", "-p", "no:asyncio", "-p", "no:timeout", "-v", timeout=60)


def test_what_a_wider_fixture_opens_is_its_own_until_it_is_torn_down(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
@pytest.fixture(scope="session", autouse=True)
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOR_ALL", "1")
        yield

@pytest.fixture(scope="module", params=["one", "two"])
def context(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARAM", request.param)
        context = manager.create_isolated_context(request.param)
        yield context
        context.close()

def test_first(context): assert os.environ["PARAM"] == context.user_id
def test_second(context): assert os.environ["FOR_ALL"]

class TestClass:
    @classmethod
    def setup_class(cls): cls.context = manager.create_isolated_context("of the class")
    @classmethod
    def teardown_class(cls): cls.context.close()
    def test_third(self): pass
    def test_fourth(self): pass
""",
    )
    result.assert_outcomes(passed=6)


def test_what_a_wider_fixture_leaves_is_put_down_to_it_once(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
@pytest.fixture(scope="module")
def leaky():
    os.environ["LEFT"] = "hunter2"
    return manager.create_isolated_context("alice")

def test_first(leaky): pass
def test_last(leaky): manager.create_isolated_context("bob")
""",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*--ucm-strict: test_last left behind",
            "*a context open: context of user 'alice'*; made by the module-scoped fixture 'leaky'",
            "*a context open: context of user 'bob'*.py:*",
            "*a changed environment, now put back: LEFT (added by the module-scoped fixture 'leaky')",
        ]
    )
    assert "hunter2" not in result.stdout.str()


def test_what_is_left_is_blamed_on_one_test_only(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
def test_leaks():
    os.environ["LEFT"] = os.environ["PATH"] = "1"
    manager.create_isolated_context("alice").create_child_context("search")

def test_is_clean(): assert "LEFT" not in os.environ and os.environ["PATH"] != "1"
def test_closes_what_the_other_left(): manager.cleanup_all_contexts()
""",
    )
    result.assert_outcomes(passed=3, errors=1)
    assert result.stdout.str().count("a context ") == 1  # and the child is not told of beside its parent


def test_a_teardown_under_way_in_another_thread_is_waited_for(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
def test_the_thread_closes():
    context = manager.create_isolated_context("alice")
    opened, looked_at = threading.Event(), threading.Event()

    class Pool:
        async def aclose(self): pass

    async def serve():
        context.closing(Pool())
        opened.set()
        await asyncio.to_thread(looked_at.wait)
        await context.aclose()

    may_still_close = context_watch.may_still_close
    context_watch.may_still_close = lambda context: looked_at.set() or may_still_close(context)
    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    opened.wait()
""",
    )
    result.assert_outcomes(passed=1)


def test_looks_stay_short_and_see_what_comes_later(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
import gc
from ucm_middleware.testing.context_watch import SETTLING

@pytest.fixture(scope="class")
def context():
    context = manager.create_isolated_context("alice")
    yield context

def test_thaws():
    gc.unfreeze()
    assert gc.get_freeze_count() == 0

class TestWithAContextOfTheirs:
    @pytest.mark.parametrize("number", range(SETTLING))
    def test_frozen_it_would_be_overlooked(self, context, number):
        assert gc.get_freeze_count() < 10_000  # a collection puts what is immortal there, on CPython 3.12

@pytest.mark.parametrize("number", range(SETTLING))
def test_nothing(number): pass

def test_leaks():
    assert gc.get_freeze_count() > 10_000
    manager.create_isolated_context("bob")
""",
    )
    result.assert_outcomes(passed=2 * SETTLING + 2, errors=2)
    result.stdout.fnmatch_lines(["*user 'alice'*; made by the class-scoped fixture 'context'", "*user 'bob'*"])


def test_a_test_that_fails_anyway_is_told_both(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
@pytest.fixture
def breaks():
    yield
    raise ValueError("the teardown's own error")

def test_fails():
    manager.create_isolated_context("alice")
    assert False, "the test's own error"

def test_fails_late(breaks): manager.create_isolated_context("bob")
""",
    )
    result.assert_outcomes(failed=1, passed=1, errors=2)
    output = result.stdout.str()
    for text in ("the test's own error", "the teardown's own error", "user 'alice'", "user 'bob'"):
        assert text in output


def test_a_context_that_a_manager_refused_is_no_leak(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
def test_refused():
    contexts = [manager.create_isolated_context("alice") for _ in range(2)]
    with pytest.raises(ContextLimitError) as refused:  # its traceback holds what was refused, in a reference cycle
        manager.create_isolated_context("alice")
    assert refused.value.limit == 2
    for context in contexts:
        context.close()

def test_by_hand_and_gone(): create_isolated_execution_context("alice")

@pytest.fixture
def by_hand(): return [create_isolated_execution_context("alice")]

@pytest.fixture
def kept_by_another(by_hand): return {"first": by_hand[0]}

def test_fixtures_that_return_some(by_hand, kept_by_another): assert by_hand[0].is_open

def test_fixture_asked_for_in_the_test(request): assert request.getfixturevalue("by_hand")
""",
    )
    result.assert_outcomes(passed=4)
