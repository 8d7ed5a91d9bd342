"""What may be protected and by whom; the guard in the log and in spans."""

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode

from support.clock import Clock
from support.contexts import MakeManager, running_as, visitor
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    EgressFilter,
    EgressPolicy,
    EgressSpanProcessor,
    InvalidContextError,
    UserContextManager,
    create_isolated_execution_context,
)

pytestmark = pytest.mark.security

TOKEN = "9f3c1a7be85d20c46fa17d39b2e80c54"


@pytest.fixture(params=[False, True], ids=["report", "block"])
def manager(request: pytest.FixtureRequest, make_manager: MakeManager) -> UserContextManager:
    return make_manager(egress=EgressPolicy(block=request.param, fields=["token"]))


def found(manager: UserContextManager) -> list[tuple[object, ...]]:
    records = [record for record in manager.get_system_trail() if record["event"] == "egress"]
    return [(record["channel"], record["field"], record["receiver"], record["owners"]) for record in records]


class TestProtect:
    def test_refuses_what_is_no_token(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice") as alice, pytest.raises(InvalidContextError, match="entropy"):
            alice.protect("hello")

    def test_needs_a_guard(self, make_manager: MakeManager) -> None:
        with running_as(make_manager(), "alice") as alice, pytest.raises(ConfigurationError, match="EgressPolicy"):
            alice.protect(TOKEN)
        loose = create_isolated_execution_context("alice")
        with pytest.raises(ConfigurationError):
            loose.protect(TOKEN)
        loose.close()

    def test_is_the_users_own(self, manager: UserContextManager) -> None:
        bob = manager.create_isolated_context("bob")
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            bob.protect(TOKEN)
        bob.close()
        with pytest.raises(ContextClosedError):
            bob.protect(TOKEN)

    def test_an_anonymous_users_values_become_the_users(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        context.protect(TOKEN)
        context.bind("alice")
        assert manager.egress is not None
        assert not manager.egress.hits(TOKEN.encode(), "alice", None, "response")
        assert [hit.owners for hit in manager.egress.hits(TOKEN.encode(), "bob", None, "response")] == [{"alice"}]
        context.close()

    def test_what_a_context_is_opened_with_is_learned(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice", agent_context={"login": [{"token": TOKEN, "other": "x"}]})
        assert manager.egress is not None
        assert manager.egress.hits(TOKEN.encode(), "bob", None, "response")
        context.close()

    def test_the_sweeper_forgets(self, make_manager: MakeManager) -> None:
        clock = Clock()
        manager = make_manager(egress=EgressPolicy(keep_seconds=10), clock=clock)
        with running_as(manager, "alice") as alice:
            alice.protect(TOKEN)
        assert manager.egress is not None
        clock.advance(11)
        manager.sweep()
        assert len(manager.egress.table) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"fields": "token"}, {"fields": [""]}, {"min_entropy": 8}, {"max_values": 0}, {"keep_seconds": 0}],
)
def test_a_policy_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        EgressPolicy(**wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.fixture
def written(manager: UserContextManager) -> Iterator[io.StringIO]:
    """What a handler with the filter on it has written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(EgressFilter(manager))
    logger = logging.getLogger("of_the_guard")
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)


class Bad:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class TestLog:
    def test_formatters_keep_their_own_tracebacks(self, manager: UserContextManager, written: io.StringIO) -> None:
        class Short(logging.Formatter):
            def formatException(self, ei: Any) -> str:  # noqa: N802
                return f"short {ei[0].__name__}"

        log = logging.getLogger("of_the_guard")
        log.handlers[0].setFormatter(Short())
        with running_as(manager, "bob"):
            try:
                raise ValueError("x")
            except ValueError:
                log.exception("failed")
        assert written.getvalue() == "failed\nshort ValueError\n"

    def test_what_cannot_be_formatted_is_loggings_to_complain_of(
        self, manager: UserContextManager, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        complaints: list[logging.LogRecord] = []
        log = logging.getLogger("of_the_guard")
        monkeypatch.setattr(log, "handlers", log.handlers[:1])
        monkeypatch.setattr(log.handlers[0], "handleError", complaints.append)
        with running_as(manager, "bob"):
            log.warning("%s", Bad())
        assert len(complaints) == 1

    def test_plain_data_among_the_extras(self, manager: UserContextManager, written: io.StringIO) -> None:
        log = logging.getLogger("of_the_guard")
        log.handlers[0].setFormatter(logging.Formatter("%(data)s"))
        with running_as(manager, "alice") as alice:
            alice.protect(TOKEN)
        with running_as(manager, "bob"):
            log.warning("see", extra={"data": {"a": [TOKEN]}})
        assert len(found(manager)) == 1
        assert manager.egress is not None
        assert (TOKEN in written.getvalue()) is not manager.egress.policy.block

    def test_another_users_value(self, manager: UserContextManager, written: io.StringIO) -> None:
        log = logging.getLogger("of_the_guard")
        with running_as(manager, "alice") as alice:
            alice.protect(TOKEN)
            log.warning("mine: %s", TOKEN)
        assert found(manager) == []
        with running_as(manager, "bob"):
            log.warning("hers: %s", TOKEN)
            try:
                raise ValueError(TOKEN)
            except ValueError:
                log.exception("failed")
        log.warning("nobody's: %s", TOKEN)
        assert found(manager) == [("log", "of_the_guard", "bob", ["alice"])] * 2
        assert manager.egress is not None
        assert written.getvalue().count(TOKEN) == (2 if manager.egress.policy.block else 4)


def test_the_owner_is_told_of_no_name_that_stood_in_another_s_answer(manager: UserContextManager) -> None:
    with running_as(manager, "alice") as alice:
        alice.protect(TOKEN)
    with running_as(manager, "bob"):
        manager.post_event("bob", "news", {"from": {"carol": TOKEN}})
    assert found(manager) == [("event", "$.from.carol", "bob", ["alice"])]
    for user, told in (("alice", 1), ("bob", 0)):
        trail: Any = manager.get_audit_trail(user)
        records = [record for record in trail["events"] if record["event"] == "egress"]
        assert len(records) == told
        assert not [record for record in records if "carol" in str(record) or "bob" in str(record)]


def test_spans(manager: UserContextManager) -> None:
    provider = TracerProvider()
    provider.add_span_processor(EgressSpanProcessor(manager))
    tracer = provider.get_tracer("test")
    with running_as(manager, "alice") as alice:
        alice.protect(TOKEN)
        with tracer.start_as_current_span("hers", attributes={"a": TOKEN}):
            pass
    assert found(manager) == []
    with running_as(manager, "bob"), tracer.start_as_current_span("his", attributes={"a": [TOKEN]}) as span:
        span.add_event("seen", {"b": f"it was {TOKEN}"})
    assert found(manager) == [("span", "a", "bob", ["alice"]), ("span", "event.b", "bob", ["alice"])]
    provider.shutdown()


def test_spans_have_more_places_than_attributes(manager: UserContextManager) -> None:
    provider = TracerProvider()
    provider.add_span_processor(EgressSpanProcessor(manager))
    tracer = provider.get_tracer("test")
    with running_as(manager, "alice") as alice:
        alice.protect(TOKEN)
    with running_as(manager, "bob"), tracer.start_as_current_span("his", record_exception=False) as span:
        span.set_status(StatusCode.ERROR, TOKEN)
        span.set_attribute(TOKEN, TOKEN)
    assert sorted(found(manager)) == [("span", "<name>", "bob", ["alice"]), ("span", "status", "bob", ["alice"])]
    provider.shutdown()


def test_what_came_before_it_was_protected_is_no_hit_in_the_same_request(manager: UserContextManager) -> None:
    guard = manager.egress
    assert guard is not None
    with running_as(manager, "bob") as bob:
        exchange = guard.exchange(bob, {"type": "http", "path": f"/{TOKEN}"})
    with running_as(manager, "alice") as alice:
        alice.protect(TOKEN)
    assert not guard.hits(TOKEN.encode(), "bob", exchange, "response")
    assert guard.hits(TOKEN.encode(), "bob", None, "response")
