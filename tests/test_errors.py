"""The errors: one family, with fields, that say what to do."""

import copy
import pickle
from collections.abc import Callable

import pytest

from ucm_middleware import errors
from ucm_middleware.errors import (
    AgentError,
    AgentParametersError,
    AgentTimeoutError,
    ClusterUnavailableError,
    ConfigurationError,
    ContextClosedError,
    ContextExpiredError,
    ContextIsolationError,
    ContextLeakError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    EgressBlockedError,
    ErasureIncompleteError,
    HandleRevokedError,
    IdentityConflictError,
    InvalidContextError,
    InvalidEventError,
    LedgerFileError,
    LedgerUnavailableError,
    ManagerDrainingError,
    MessageLimitError,
    OriginError,
    PluginError,
    UnauthenticatedError,
    UnknownAgentError,
    UserContextError,
)

EACH = [
    ConfigurationError("a setting is wrong"),
    PluginError("journal", "ucm-journal 1.5", "it is too old", "upgrade it"),
    InvalidContextError("user_id", "is empty", "give the id"),
    ContextNotFoundError("there is none"),
    ContextExpiredError("it is over"),
    ContextClosedError("r-1", "app.py:7", "expired"),
    HandleRevokedError("r-1", "app.py:7", "db, made at app.py:9"),
    ContextLimitError("user", 10, "close one"),
    ContextIsolationError("they share", ["a.x and b.x"]),
    CrossUserAccessError("not yours"),
    ContextLeakError("r-1", "app.py:7", ["task shop.write, at shop.py:9"]),
    EgressBlockedError("it was held back"),
    IdentityConflictError("two users"),
    InvalidEventError("event", "is empty", "name it"),
    AgentError("planner", "returned None", "return one"),
    UnknownAgentError("planner", "is unknown", "register it"),
    AgentParametersError("planner", "lacks a prompt", "give one"),
    AgentTimeoutError("planner", "did not end", "wait longer"),
    MessageLimitError("size", 1024),
    OriginError("another site"),
    UnauthenticatedError("nobody"),
    ManagerDrainingError("closing time"),
    LedgerUnavailableError("the disk is full"),
    ClusterUnavailableError("timeout", retry_after=2.5, is_unknown=True),
    LedgerFileError("audit.db", "is a directory", "name a file"),
    ErasureIncompleteError("keys.db", "is being read", "erase again", [bytes(16)]),
]


def test_each_error_of_the_module_is_here() -> None:
    of_module = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert of_module == {type(error) for error in EACH} | {UserContextError}


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (InvalidContextError, ValueError),
        (ConfigurationError, ValueError),
        (PluginError, ConfigurationError),
        (ContextNotFoundError, KeyError),
        (ContextExpiredError, ContextNotFoundError),
        (HandleRevokedError, ContextClosedError),
        (ContextLimitError, RuntimeError),
        (CrossUserAccessError, ContextIsolationError),
        (IdentityConflictError, ContextIsolationError),
    ],
)
def test_who_catches_the_ordinary_ones_catches_ours(error: type[Exception], family: type[Exception]) -> None:
    assert issubclass(error, family)


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
def test_each_is_of_one_family(error: Exception) -> None:
    with pytest.raises(UserContextError):
        raise error


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"]
)
def test_each_crosses_a_process_boundary_whole(error: Exception, duplicate: Callable[[Exception], Exception]) -> None:
    twin = duplicate(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def test_messages_are_sentences_with_the_fields_in_them() -> None:
    assert str(InvalidContextError("user_id", "is empty", "give the id")) == "user_id: is empty; give the id"
    assert str(ContextNotFoundError("there is none")) == "there is none"
    assert str(ContextLimitError("user", 10, "close one")) == (
        "the limit of 10 live contexts (user) is reached; close one"
    )
    assert str(ContextLimitError("agent runs", 5, "wait")) == "the limit of 5 runs of agents at once is reached; wait"
    assert str(UnknownAgentError("planner", "is unknown", "register it")) == "agent 'planner': is unknown; register it"
    closed = str(ContextClosedError("r-1", "app.py:7", "expired"))
    assert closed.startswith("context r-1 is closed (expired); it was opened by app.py:7. ")
    assert (
        str(ContextIsolationError("they share", ["a.x and b.x", "a.y and b.y"]))
        == "they share: a.x and b.x; a.y and b.y"
    )


def test_fields_are_there_for_handlers() -> None:
    invalid = InvalidContextError("user_id", "is empty", "give the id")
    assert (invalid.field, invalid.rule, invalid.remedy) == ("user_id", "is empty", "give the id")
    limit = ContextLimitError("user", 10, "close one")
    assert (limit.scope, limit.limit, limit.remedy) == ("user", 10, "close one")
    closed = ContextClosedError("r-1", "app.py:7", "expired")
    assert (closed.request_id, closed.opened_by, closed.reason) == ("r-1", "app.py:7", "expired")
    assert ContextIsolationError("they share", ["one", "two"]).findings == ("one", "two")
    assert CrossUserAccessError("not yours").findings == ()
    agent = AgentError("planner", "returned None", "return one")
    assert (agent.agent, agent.problem, agent.remedy) == ("planner", "returned None", "return one")
