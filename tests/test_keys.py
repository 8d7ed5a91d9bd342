"""Owner-derived keys: whose they are, what they are made of, and that a foreign record looks like none."""

import gc
import hmac
import json
import logging
import os
import re
import subprocess
import sys
import traceback
from base64 import b32encode
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ucm_middleware
from support.contexts import MakeManager, events, running_as, visitor
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    IsolatedEnvironment,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    hookimpl,
)
from ucm_middleware.ids import validate_id
from ucm_middleware.refusal import refusal_for
from ucm_middleware.secret import Secret

pytestmark = pytest.mark.security

SECRET = "q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6"
OLDER = "N4tKj8Wc1YbQ6rMz0DpS3vUh7FgLx2Ao5iTe9C"
OLDEST = "eH2oZr6Xq9Kd4Vw1Jt8Ms3By7Gf0Lc5Pn-uRiA"


Managed = Callable[..., UserContextManager]


def settings_of(secret: str = SECRET, previous: tuple[str, ...] = ()) -> dict[str, Any]:
    production = IsolatedEnvironment(environ={})
    return {"secret": secret, "previous_secrets": previous, "environment": production, "max_contexts_per_user": 1000}


@pytest.fixture
def managed(make_manager: MakeManager) -> Managed:
    """Managers by what ``settings_of`` takes, whose contexts are closed after the test."""
    return lambda **given: make_manager(**settings_of(**given))


@pytest.fixture
def manager(managed: Managed) -> UserContextManager:
    return managed()


@pytest.fixture
def alice(manager: UserContextManager) -> UserExecutionContext:
    return manager.create_isolated_context("alice")


@pytest.fixture
def bob(manager: UserContextManager) -> UserExecutionContext:
    return manager.create_isolated_context("bob")


def derived(owner: str, kind: str, client_id: str) -> str:
    context = shared.create_isolated_context(owner)
    try:
        return context.derive_key(kind, client_id)
    finally:
        context.close()


shared = UserContextManager(**settings_of())


class TestWhatAKeyIsMadeOf:
    def test_it_never_changes(self) -> None:
        """What is stored in the world stands under keys like this one: another here, and all of it is lost."""
        assert derived("alice", "thread", "t-1") == "ucm1_m2imaqvp_fslbxa66wt5z7c4mi2ri32nexb7dnhoks7eo67zn"

    def test_as_it_is_documented(self) -> None:
        for owner, kind, client_id in (("alice", "thread", "t-1"), ("Jos\u00e9", "session_2", "a b/c:\U0001f600")):
            parts = [part.encode() for part in (owner, kind, client_id)]
            message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
            secret = Secret(SECRET.encode())
            digest = hmac.digest(secret.subkey("owner-derived keys"), message, "sha256")[:25]
            expected = f"ucm1_{secret.fingerprint}_{b32encode(digest).decode().lower()}"
            assert derived(owner, kind, client_id) == expected

    @given(st.text(min_size=1, max_size=256))
    def test_it_serves_any_store(self, text: str) -> None:
        try:
            client_id = validate_id(text, "client_id")
        except InvalidContextError:
            client_id = "plain"
        key = derived("alice", "thread", client_id)
        assert re.fullmatch(r"ucm1_[a-z2-7]{8}_[a-z2-7]{40}", key)
        assert len(key) == 54
        assert validate_id(key, "key") == key

    def test_a_key_is_no_secret_of_its_parts(self) -> None:
        key = derived("alice", "thread", "salary-2026")
        assert not {"alice", "thread", "salary"} & set(re.split(r"[_-]", key))

    @pytest.mark.parametrize(
        "kind", ["", "Thread", "thread id", "2nd", "_thread", "thr\u00e9ad", "thread\n", "t" * 33, None, 7, b"thread"]
    )
    def test_a_kind_is_a_name_in_the_code(self, alice: UserExecutionContext, kind: Any) -> None:
        for ask in (alice.derive_key, alice.candidate_keys, lambda kind, id_: alice.check_key(kind, id_, None)):
            with pytest.raises(InvalidContextError) as caught:
                ask(kind, "t-1")
            assert caught.value.field == "kind"
            assert refusal_for(caught.value) is None  # the application's own fault: no client can have given it

    @pytest.mark.parametrize("client_id", ["", " t-1", "t\0", "null", "t" * 257, "anonymous_1"])
    def test_a_clients_id_is_checked_like_any_id(self, alice: UserExecutionContext, client_id: Any) -> None:
        for ask in (alice.derive_key, alice.candidate_keys, lambda kind, id_: alice.check_key(kind, id_, None)):
            with pytest.raises(InvalidContextError) as caught:
                ask("thread", client_id)
            assert caught.value.field == "client_id"
            refusal = refusal_for(caught.value)
            assert refusal is not None
            assert refusal.status == 400

    @pytest.mark.parametrize("client_id", [None, 7, b"t-1"])
    def test_a_clients_id_that_is_no_text_is_the_applications_fault(
        self, alice: UserExecutionContext, client_id: Any
    ) -> None:
        with pytest.raises(InvalidContextError, match="client_id: is not text") as caught:
            alice.derive_key("thread", client_id)
        assert refusal_for(caught.value) is None


OWNERS = st.sampled_from(["a", "ab", "a_b", "Alice", "alice", "Jos\u00e9", "Jose\u0301", "a:b", "\u0430lice"])
KINDS = st.sampled_from(["a", "ab", "a_b", "b", "alice", "thread"])
CLIENT_IDS = st.one_of(
    st.sampled_from(["a", "b", "ab", "a_b", "bc", "c", "thread", "Jos\u00e9", "Jose\u0301", "\ufb01", "fi", "A"]),
    st.text(st.sampled_from("ab_:/\u00e9"), min_size=1, max_size=5),
)
TRIPLES = st.tuples(OWNERS, KINDS, CLIENT_IDS)


class TestNoTwoAreOne:
    @given(TRIPLES, TRIPLES)
    def test_two_keys_are_one_only_where_owner_kind_and_id_are(
        self, one: tuple[str, str, str], other: tuple[str, str, str]
    ) -> None:
        assert (derived(*one) == derived(*other)) is (one == other)

    @given(st.text(st.sampled_from("abcxyz"), min_size=3, max_size=20), st.data())
    def test_wherever_the_same_text_is_cut(self, text: str, data: st.DataObject) -> None:
        def cut() -> tuple[str, str, str]:
            first = data.draw(st.integers(1, len(text) - 2))
            second = data.draw(st.integers(first + 1, len(text) - 1))
            return text[:first], text[first:second], text[second:]

        one, other = cut(), cut()
        try:
            for owner, _, client_id in (one, other):
                validate_id(owner, "user_id")
                validate_id(client_id, "client_id")
        except InvalidContextError:  # three letters that are a placeholder
            return
        assert (derived(*one) == derived(*other)) is (one == other)

    def test_an_id_that_looks_like_the_encoding_of_others(self) -> None:
        keys = {derived("a", "k", "b"), derived("a", "k", "b k"), derived("a", "kb", "k"), derived("ak", "b", "k")}
        assert len(keys) == 4


class TestWhoseTheyAre:
    def test_each_user_has_another(self, alice: UserExecutionContext, bob: UserExecutionContext) -> None:
        assert alice.derive_key("thread", "t-1") != bob.derive_key("thread", "t-1")

    def test_a_user_has_the_same_in_each_context(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        child = alice.create_child_context("part")
        again = manager.create_isolated_context("alice")
        keys = {context.derive_key("thread", "t-1") for context in (alice, child, again)}
        assert len(keys) == 1

    def test_under_another_secret_it_is_another(self, alice: UserExecutionContext, managed: Managed) -> None:
        other = managed(secret=OLDER).create_isolated_context("alice")
        key, others = alice.derive_key("thread", "t-1"), other.derive_key("thread", "t-1")
        assert key[5:13] != others[5:13]
        assert key[14:] != others[14:]

    def test_code_of_another_user_derives_none(self, manager: UserContextManager, bob: UserExecutionContext) -> None:
        with running_as(manager, "alice"):
            for ask in (bob.derive_key, bob.candidate_keys, lambda kind, id_: bob.check_key(kind, id_, None)):
                with pytest.raises(CrossUserAccessError):
                    ask("thread", "t-1")
            with manager.privileged(reason="a move", users=["bob"]):
                bob.derive_key("thread", "t-1")
        asked = [(event["action"], event["asked_for"]) for event in events(manager, "alice", "denied")]
        assert asked == [("derive_key", "bob"), ("derive_key", "bob"), ("check_key", "bob")]

    def test_code_of_nobody_derives_none_where_it_is_not_trusted(
        self, manager: UserContextManager, alice: UserExecutionContext
    ) -> None:
        manager.serve()
        with pytest.raises(CrossUserAccessError, match="runs in no user's context"):
            alice.derive_key("thread", "t-1")

    def test_a_closed_context_derives_none(self, alice: UserExecutionContext) -> None:
        alice.close()
        for ask in (alice.derive_key, alice.candidate_keys, lambda kind, id_: alice.check_key(kind, id_, None)):
            with pytest.raises(ContextClosedError):
                ask("thread", "t-1")

    def test_while_resources_are_released_it_still_does(self, alice: UserExecutionContext) -> None:
        keys: list[str] = []
        expected = alice.derive_key("thread", "t-1")
        alice.callback(lambda: keys.append(alice.derive_key("thread", "t-1")))
        alice.close()
        assert keys == [expected]

    def test_without_a_manager_there_is_no_secret(self, manager: UserContextManager) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(ConfigurationError, match=r"under no manager.*manager\.set_context\(\)"):
            context.derive_key("thread", "t-1")
        manager.set_context("alice", context)
        assert context.derive_key("thread", "t-1") == derived("alice", "thread", "t-1")

    def test_in_production_without_a_secret_it_is_refused(self, make_manager: MakeManager) -> None:
        unset = make_manager(environment=IsolatedEnvironment(environ={}))
        context = unset.create_isolated_context("alice")
        for ask in (context.derive_key, context.candidate_keys, lambda kind, id_: context.check_key(kind, id_, None)):
            with pytest.raises(ConfigurationError, match="UCM_SECRET is not set") as caught:
                ask("thread", "t-1")
            assert refusal_for(caught.value) is None


class TestAnonymousOnes:
    def test_each_has_its_own(self, manager: UserContextManager) -> None:
        one, other = visitor(manager), visitor(manager)
        key = one.derive_key("thread", "t-1")
        assert key == one.derive_key("thread", "t-1") == one.check_key("thread", "t-1", key)
        assert key != other.derive_key("thread", "t-1")

    @pytest.mark.parametrize("ask", ["derive_key", "candidate_keys"])
    def test_after_that_it_stays_anonymous(self, manager: UserContextManager, ask: str) -> None:
        context = visitor(manager)
        getattr(context, ask)("thread", "t-1")
        with pytest.raises(IdentityConflictError, match="bind the identity first"):
            context.bind("alice")
        assert context.is_anonymous
        context.derive_key("thread", "t-2")

    def test_checking_one_settles_it_too(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        with pytest.raises(CrossUserAccessError):
            context.check_key("thread", "t-1", None)
        with pytest.raises(IdentityConflictError, match="bind the identity first"):
            context.bind("alice")

    def test_a_child_settles_its_parents(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        child = context.create_child_context("part")
        grandchild = child.create_child_context("part of it")
        grandchild.derive_key("thread", "t-1")
        child.close()
        with pytest.raises(IdentityConflictError, match="bind the identity first"):
            context.bind("alice")

    def test_bound_before_it_has_the_users(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        context.bind("alice")
        assert context.derive_key("thread", "t-1") == derived("alice", "thread", "t-1")
        context.bind("alice")

    def test_another_user_s_code_settles_nothing(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            context.derive_key("thread", "t-1")
        context.bind("alice")

    def test_a_bad_name_settles_nothing(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        with pytest.raises(InvalidContextError):
            context.derive_key("thread", "")
        context.bind("alice")


def denial(context: UserExecutionContext, found: str | None) -> tuple[CrossUserAccessError, list[str]]:
    """What is raised for a record, and the functions that it went through."""
    with pytest.raises(CrossUserAccessError) as caught:
        context.check_key("thread", "t-1", found)
    return caught.value, [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][1:]


class TestWhatIsChecked:
    def test_ones_own_is_let_through(self, alice: UserExecutionContext) -> None:
        key = alice.derive_key("thread", "t-1")
        assert alice.check_key("thread", "t-1", key) == key

    def test_anything_else_is_not(
        self, alice: UserExecutionContext, bob: UserExecutionContext, managed: Managed
    ) -> None:
        key = alice.derive_key("thread", "t-1")
        others = [
            bob.derive_key("thread", "t-1"),
            alice.derive_key("thread", "t-2"),
            alice.derive_key("session", "t-1"),
            managed(secret=OLDER).create_isolated_context("alice").derive_key("thread", "t-1"),
            key.upper(), f"{key} ", key[:-1], key[1:], f"\0{key[1:]}", "", "t-1", "alice", "\u00e9" * 54, "\udcff" * 54,
        ]  # fmt: skip
        for found in (*others, None):
            denial(alice, found)

    @given(st.none() | st.text())
    def test_nothing_that_is_made_up_passes(self, found: str | None) -> None:
        context = shared.create_isolated_context("alice")
        try:
            denial(context, found)
        finally:
            context.close()

    @pytest.mark.parametrize("found", [b"ucm1_", 7, memoryview(b"ucm1_"), ["ucm1_"]], ids=type)
    def test_what_is_no_text_is_the_adapters_fault(self, alice: UserExecutionContext, found: Any) -> None:
        with pytest.raises(InvalidContextError, match="found: is not text but"):
            alice.check_key("thread", "t-1", found)


class TestForeignAndMissingAreOne:
    def test_the_error_is_the_same(self, alice: UserExecutionContext, bob: UserExecutionContext) -> None:
        foreign, foreign_way = denial(alice, bob.derive_key("thread", "t-1"))
        missing, missing_way = denial(alice, None)
        assert type(foreign) is type(missing) is CrossUserAccessError
        assert (str(foreign), foreign.args, vars(foreign)) == (str(missing), missing.args, vars(missing))
        assert foreign_way == missing_way
        for error in (foreign, missing):
            assert error.__cause__ is None
            assert error.__context__ is None
        assert "t-1" not in str(foreign)

    def test_the_record_is_the_same(self, manager: UserContextManager, bob: UserExecutionContext) -> None:
        foreign_key = bob.derive_key("thread", "t-1")
        with running_as(manager, "alice") as alice:
            key = alice.derive_key("thread", "t-1")
            denial(alice, foreign_key)
            denial(alice, None)
        foreign, missing = events(manager, "alice", "denied")
        assert foreign.pop("at") <= missing.pop("at")
        assert foreign == missing
        assert (foreign["action"], foreign["asked_for"]) == ("check_key", f"thread {key}")
        assert events(manager, "bob", "denied") == []

    def test_the_record_has_nothing_that_was_typed(self, manager: UserContextManager) -> None:
        typed = "my password is hunter2"
        with running_as(manager, "alice") as alice, pytest.raises(CrossUserAccessError):
            alice.check_key("thread", typed, None)
        [record] = events(manager, "alice", "denied")
        assert "hunter2" not in json.dumps(record)

    @pytest.mark.parametrize("previous", [(), (OLDER, OLDEST)], ids=["one secret", "in a rotation"])
    def test_the_steps_are_the_same(self, previous: tuple[str, ...], managed: Managed) -> None:
        """Each function is called, and each line run, equally often: so the time is the same as well."""
        manager = managed(previous=previous)
        bob = manager.create_isolated_context("bob")
        foreign_keys = bob.candidate_keys("thread", "t-1")
        with running_as(manager, "alice") as alice:
            denial(alice, None)  # what is done once is done
            missing = steps_of(alice, None)
            assert missing[0]["compare_digest"] == 1 + len(previous)
            for foreign_key in foreign_keys:
                assert steps_of(alice, foreign_key) == missing

    def test_the_steps_are_the_same_for_what_no_secret_explains_once_it_is_reported(self, managed: Managed) -> None:
        lost = managed(secret=OLDER).create_isolated_context("bob").derive_key("thread", "t-1")
        with running_as(managed(), "alice") as alice:
            denial(alice, lost)
            assert steps_of(alice, lost) == steps_of(alice, None)

    def test_the_steps_are_the_same_when_a_plugin_makes_the_keys(self) -> None:
        class Plain:
            @hookimpl
            def ucm_derive_key(self, context: UserExecutionContext, client_id: str) -> str:
                return f"{context.user_id}/{client_id}"

        manager = UserContextManager(plugins=[Plain()])
        before_the_plugin = derived("bob", "thread", "t-1")
        with running_as(manager, "alice") as alice:
            denial(alice, None)  # what is done once is done
            missing = steps_of(alice, None)
            assert missing[0]["compare_digest"] == 1
            denial(alice, before_the_plugin)
            for foreign_key in ("bob/t-1", "roberta/t-1", before_the_plugin):
                assert steps_of(alice, foreign_key) == missing


def steps_of(context: UserExecutionContext, found: str | None) -> tuple[Counter[str], int]:
    """How often each function is called, in Python and in C, and how many lines run until the refusal."""
    calls: Counter[str] = Counter()
    lines = 0

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[argument.__qualname__] += 1

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return on_line

    profile, trace = sys.getprofile(), sys.gettrace()
    raised: object = None
    gc.disable()  # finalizers of others would run in between
    try:
        sys.setprofile(on_call)
        sys.settrace(on_line)
        context.check_key("thread", "t-1", found)
    except CrossUserAccessError as error:
        raised = error
    finally:
        sys.settrace(trace)
        sys.setprofile(profile)
        gc.enable()
    assert raised is not None
    return calls, lines


class TestRotation:
    def test_what_is_stored_is_found_checked_and_moved(self, managed: Managed) -> None:
        store = {}
        before = managed(secret=OLDEST).create_isolated_context("alice")
        store[before.derive_key("thread", "t-1")] = "stored long ago"
        alice = managed(previous=(OLDER, OLDEST)).create_isolated_context("alice")
        candidates = alice.candidate_keys("thread", "t-1")
        assert candidates[0] == alice.derive_key("thread", "t-1")
        assert len(set(candidates)) == 3
        [found] = [key for key in candidates if key in store]
        current = alice.check_key("thread", "t-1", found)
        assert current == candidates[0] != found
        store[current] = store.pop(found)
        # Once everything is moved, the previous secrets go.
        after = managed().create_isolated_context("alice")
        assert store[after.check_key("thread", "t-1", current)] == "stored long ago"

    def test_workers_before_and_after_the_exchange_find_each_others(self, managed: Managed) -> None:
        before = managed(secret=OLDER, previous=(SECRET,)).create_isolated_context("alice")
        after = managed(secret=SECRET, previous=(OLDER,)).create_isolated_context("alice")
        for one, other in ((before, after), (after, before)):
            key = one.derive_key("thread", "t-1")
            assert key in other.candidate_keys("thread", "t-1")
            assert other.check_key("thread", "t-1", key) == other.derive_key("thread", "t-1") != key

    def test_a_previous_secret_makes_nobody_elses_pass(self, managed: Managed) -> None:
        older_bobs = managed(secret=OLDER).create_isolated_context("bob").derive_key("thread", "t-1")
        alice = managed(previous=(OLDER,)).create_isolated_context("alice")
        foreign, _ = denial(alice, older_bobs)
        missing, _ = denial(alice, None)
        assert foreign.args == missing.args

    def test_what_no_secret_explains_is_told_to_the_operator_once_and_to_no_client(
        self, caplog: pytest.LogCaptureFixture, managed: Managed
    ) -> None:
        older = managed(secret=OLDER).create_isolated_context("alice").derive_key("thread", "t-1")
        rotated = managed()
        alice = rotated.create_isolated_context("alice")
        unknown, unknown_way = denial(alice, older)
        missing, missing_way = denial(alice, None)
        assert (unknown.args, unknown_way) == (missing.args, missing_way)
        denial(rotated.create_isolated_context("bob"), older)
        [record] = caplog.records
        assert record.levelno == logging.ERROR
        said = record.getMessage()
        for part in ("kind thread", older[5:13], alice.derive_key("thread", "t-1")[5:13], "set UCM_SECRET_PREVIOUS"):
            assert part in said
        assert older[14:] not in said

    def test_nothing_is_told_of_what_the_secrets_explain_and_of_what_is_no_key(
        self, caplog: pytest.LogCaptureFixture, managed: Managed
    ) -> None:
        manager = managed(previous=(OLDER,))
        alice, bob = (manager.create_isolated_context(user) for user in ("alice", "bob"))
        for found in (*bob.candidate_keys("thread", "t-1"), None, "t-1", "ucm1_", "x" * 54):
            denial(alice, found)
        assert caplog.records == []

    def test_made_up_fingerprints_do_not_fill_the_log(
        self, alice: UserExecutionContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        for letter in "abcdefghijklmnopqrstuvwxyz":
            denial(alice, f"ucm1_{letter * 8}_{letter * 40}")
        assert len(caplog.records) == 16


WORKER = """
import logging, sys
from ucm_middleware import UserContextManager
logging.basicConfig(format="%(levelname)s %(message)s")
context = UserContextManager().create_isolated_context("alice")
for _ in range(2):
    key = context.derive_key("thread", "t-1")
print(key)
"""


def worker(**env: str) -> tuple[str, str]:
    """What a process of its own derives, and what it says on the side."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UCM_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORKER],
        env={**inherited, "PYTHONPATH": str(Path(ucm_middleware.__file__).parents[1]), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip(), done.stderr.strip()


class TestSeveralProcesses:
    def test_with_the_secret_they_derive_the_same(self) -> None:
        one, other = worker(UCM_SECRET=SECRET), worker(UCM_SECRET=SECRET, PYTHONHASHSEED="1")
        assert one == other == (derived("alice", "thread", "t-1"), "")

    def test_without_one_in_development_each_has_its_own_and_says_so_once(self) -> None:
        (one, said), (other, _) = worker(UCM_ENVIRONMENT="development"), worker(UCM_ENVIRONMENT="development")
        assert one.startswith("ucm1_")
        assert one != other
        assert said.count("WARNING UCM_SECRET is not set") == 1
        assert len(said.splitlines()) == 1

    def test_without_one_in_production_none_is_derived(self) -> None:
        key, said = worker()
        assert key == ""
        assert "ConfigurationError: UCM_SECRET is not set" in said
