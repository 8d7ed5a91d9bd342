"""What a binding says of a user, and what it refuses, before any database is asked."""

from collections.abc import Callable
from typing import cast

import pytest

from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    InvalidContextError,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
)
from ucm_postgres import RESET, Binding


@pytest.fixture
def alice() -> UserExecutionContext:
    return UserContextManager().create_isolated_context("alice")


def test_the_user_is_the_value_of_the_setting(alice: UserExecutionContext) -> None:
    assert Binding().settings(alice) == (("app.user_id", "alice"),)
    assert Binding(setting="shop.who").settings(alice) == (("shop.who", "alice"),)


def test_the_role_comes_along(alice: UserExecutionContext) -> None:
    assert Binding(role="app").settings(alice) == (("app.user_id", "alice"), ("role", "app"))
    of_user = Binding(role_of=lambda context: f"u_{context.user_id}")
    assert of_user.settings(alice) == (("app.user_id", "alice"), ("role", "u_alice"))


@pytest.mark.parametrize("user_id", ["o'brien", 'a"b', "back\\slash", "$1", "%s", "Zoë", "x" * 256])
def test_an_id_is_passed_on_as_it_is(user_id: str) -> None:
    assert Binding().settings(UserContextManager().create_isolated_context(user_id)) == (("app.user_id", user_id),)


@pytest.mark.parametrize("user_id", ["nul\0", "x" * 10_000, "", "a\nb"])
def test_an_id_that_breaks_a_rule_has_no_context_to_bind(user_id: str) -> None:
    with pytest.raises(InvalidContextError, match="user_id"):
        UserContextManager().create_isolated_context(user_id)


def test_a_closed_context_is_refused(alice: UserExecutionContext) -> None:
    alice.close()
    for binding in (Binding(), Binding(signed=True)):
        with pytest.raises(ContextClosedError):
            binding.settings(alice)


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "role",
        "user_id",
        "app.",
        ".user",
        "app..x",
        "app.user id",
        "app.x'",
        "1app.x",
        "app.x\n",
        "äpp.x",
        "app.x$ucm$",
    ],
)
def test_a_setting_that_is_no_custom_one_is_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="custom setting"):
        Binding(setting=setting)


@pytest.mark.parametrize("role", ["", "none", "a\0b", "x" * 64, "ä" * 32])
def test_a_role_that_cannot_be_one_is_refused(role: str, alice: UserExecutionContext) -> None:
    with pytest.raises(ConfigurationError, match="name of a role"):
        Binding(role=role)
    with pytest.raises(ConfigurationError, match="what role_of gives"):
        Binding(role_of=lambda context: role).settings(alice)


def test_what_is_no_text_is_no_role(alice: UserExecutionContext) -> None:
    nothing = cast("Callable[[UserExecutionContext], str]", lambda context: None)
    with pytest.raises(ConfigurationError, match="NoneType"):
        Binding(role_of=nothing).settings(alice)


def test_one_role_or_one_for_each(alice: UserExecutionContext) -> None:
    with pytest.raises(ConfigurationError, match="both"):
        Binding(role="app", role_of=lambda context: "app")


def test_only_a_manager_has_what_to_sign_with() -> None:
    context = UserExecutionContext(user_id="alice", thread_id="t1", run_id="r1")
    with pytest.raises(ConfigurationError, match="under no manager"):
        Binding(signed=True).settings(context)


def test_an_anonymous_context_is_refused() -> None:
    # Only the middleware opens one; it is tested there on a real server.
    context = UserContextManager().create_isolated_context("alice")
    object.__setattr__(context, "_anonymous", True)
    with pytest.raises(UnauthenticatedError, match="without a user"):
        Binding().settings(context)


def test_a_reset_forgets_no_prepared_statement() -> None:
    assert not any(word in statement for statement in RESET for word in ("DEALLOCATE ALL", "PLANS", "DISCARD ALL"))


def test_what_the_records_say_of_a_binding() -> None:
    assert Binding("shop.customer", role="reader", signed=True).about == {
        "bound_by": "shop.customer",
        "role": "reader",
        "signed": True,
    }
