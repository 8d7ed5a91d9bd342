"""Arguments of the wrong kind: each is refused when it is given, by its name, with what was found and what to give."""

import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from ucm_middleware import (
    ConfigurationError,
    ContextFirewall,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    session_user,
)
from ucm_middleware.audit import SQLiteLedger
from ucm_middleware.testing import FakeClock, RecordingLedger
from ucm_middleware.types import Receive, Scope, Send
from ucm_middleware.websocket.websockets import wrap_handler

variable: ContextVar[str] = ContextVar("variable")


async def app(scope: Scope, receive: Receive, send: Send) -> None: ...


OF_THE_MANAGER: list[tuple[dict[str, Any], str]] = [
    (
        {"ledger": "audit.db"},
        "ledger is no Ledger but str; give one, such as SQLiteLedger('audit.db', keys='audit-keys.db')",
    ),
    ({"ledger": "audit.db", "audit": "strict"}, "ledger is no Ledger but str"),
    ({"ledger": SQLiteLedger}, "ledger is no Ledger but the class SQLiteLedger itself"),
    (
        {"environment": ".env"},
        "environment is no IsolatedEnvironment but str; give one, such as IsolatedEnvironment('.env')",
    ),
    ({"egress": ["access_token"]}, "egress is no EgressPolicy but list; give one, such as EgressPolicy(fields="),
    ({"census": "warn"}, "census is no CensusPolicy but str; give one, such as CensusPolicy('warn')"),
    ({"isolation": [int]}, "isolation is no IsolationPolicy but list; give one, such as IsolationPolicy(shared_types="),
    ({"isolation": int}, "isolation is no IsolationPolicy but the class int itself"),
    ({"events": {"types": ["sold"]}}, "events is no EventPolicy but dict; give one, such as EventPolicy(types="),
    ({"agents": {"timeout": 5}}, "agents is no AgentPolicy but dict; give one, such as AgentPolicy(timeout="),
    ({"clock": 3}, "clock is no function but int; give one, such as time.monotonic"),
    ({"ttl": "5"}, "ttl is a str, not a number; give seconds as a number"),
    ({"ttl": 0}, "ttl is 0, not above 0 and at most a year"),
]
OF_THE_MIDDLEWARE: list[tuple[dict[str, Any], str]] = [
    (
        {"manager": UserContextManager},
        "manager is no UserContextManager but the class UserContextManager itself; give one, .* UserContextManager()",
    ),
    ({"keep": variable}, "keep must be a list of ContextVars, not <ContextVar .*; give keep=[variable]"),
    ({"keep": ("v",)}, "keep must be a list of ContextVars, not ('v',); give keep=[variable]"),
    ({"keep": "v"}, "keep must be a list of ContextVars, not 'v'"),
    ({"identify": "alice"}, "identify is no function but str; give one, such as session_user()"),
    ({"identify": session_user}, "identify is session_user itself, which makes a resolver; give session_user("),
    ({"identify": bearer_token}, "identify is bearer_token itself, which makes a resolver; give bearer_token("),
    ({"ttl": "5"}, "ttl is a str, not a number; give seconds as a number"),
    ({"ttl": 0}, "ttl is 0, not above 0 and at most a year"),
]


def pattern(said: str) -> str:
    """A regular expression in which only ``.*`` is one."""
    return "^" + ".*".join(map(re.escape, said.split(".*")))


@pytest.mark.parametrize(("given", "said"), OF_THE_MANAGER, ids=lambda one: str(one)[:40])
def test_what_a_manager_cannot_be_made_with(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=pattern(said)):
        UserContextManager(**given)


@pytest.mark.parametrize(("given", "said"), OF_THE_MIDDLEWARE, ids=lambda one: str(one)[:40])
def test_what_a_middleware_cannot_be_made_with(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=pattern(said)):
        UserContextMiddleware(app, **given)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_what_a_handler_of_websockets_cannot_be_wrapped_with(kind: str) -> None:
    def handler(connection: Any) -> None: ...
    async def async_handler(connection: Any) -> None: ...

    manager: Any = UserContextManager
    with pytest.raises(ConfigurationError, match="manager is no UserContextManager but the class"):
        wrap_handler(handler if kind == "sync" else async_handler, manager=manager)


def test_what_a_firewall_cannot_keep() -> None:
    wrong: Any = variable
    with pytest.raises(ConfigurationError, match="keep must be a list of ContextVars"):
        ContextFirewall(app, keep=wrong)


@pytest.mark.parametrize("verify", [{"token": "alice"}, "secret", None], ids=["dict", "str", "None"])
def test_what_cannot_verify_a_token(verify: Any) -> None:
    said = f"verify is no function but {type(verify).__name__}; give one, such as {{...}}.get"
    with pytest.raises(ConfigurationError, match=pattern(said)):
        bearer_token(verify)


class Recorder:
    """A ledger and a clock, and of no class of the package."""

    append = RecordingLedger.append
    trail = RecordingLedger.trail
    knows = RecordingLedger.knows

    def __init__(self) -> None:
        self._records: list[Any] = []

    def __call__(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    "given",
    [
        lambda: {"ledger": RecordingLedger(), "clock": FakeClock()},
        lambda: {"ledger": Recorder(), "clock": Recorder()},
        lambda: {"clock": lambda: 1.0},
    ],
    ids=["the package's own", "others", "a function"],
)
def test_what_has_the_methods_will_do(given: Callable[[], dict[str, Any]]) -> None:
    middleware = UserContextMiddleware(
        app,
        manager=UserContextManager(**given()),
        keep=[variable],
        identify=Recorder(),  # type: ignore[arg-type]
    )
    assert middleware.keep == (variable,)
