"""The ids of the running context in what is logged."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from support.contexts import running_as, visitor
from ucm_middleware import (
    UserContextFilter,
    UserContextManager,
    add_user_context,
    create_isolated_execution_context,
    managed_user_context,
)

FORMAT = "%(user_id)s %(request_id)s %(thread_id)s %(run_id)s %(message)s"


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager()


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler with the filter on it has written, of a logger and of its children."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(UserContextFilter())
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("of_the_test")
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)


log = logging.getLogger("of_the_test.child")


class TestFilter:
    def test_a_record_has_the_four_ids(self, written: io.StringIO) -> None:
        context = create_isolated_execution_context("alice", "r-1", thread_id="t-1", run_id="run-1")
        with managed_user_context(context):
            log.warning("hello")
        assert written.getvalue() == "alice r-1 t-1 run-1 hello\n"

    def test_outside_there_is_a_dash_and_nothing_is_dropped(self, written: io.StringIO) -> None:
        log.warning("hello")
        assert written.getvalue() == "- - - - hello\n"

    async def test_each_task_has_its_own(self, manager: UserContextManager, written: io.StringIO) -> None:
        async def work(user: str) -> None:
            async with managed_user_context(manager.create_isolated_context(user)):
                for _ in range(3):
                    await asyncio.sleep(0)
                    log.warning("by %s", user)
                await asyncio.to_thread(log.warning, "by %s", user)

        await asyncio.gather(work("alice"), work("bob"))
        lines = [line.split() for line in written.getvalue().splitlines()]
        assert len(lines) == 8
        assert all(line[0] == line[-1] for line in lines)

    def test_what_a_caller_says_does_not_stand_for_the_user(
        self, manager: UserContextManager, written: io.StringIO
    ) -> None:
        with running_as(manager, "alice"):
            log.warning("hello", extra={"user_id": "bob"})
        assert written.getvalue().startswith("alice ")

    def test_a_straggler_is_still_told_apart(self, manager: UserContextManager, written: io.StringIO) -> None:
        with running_as(manager, "alice") as context:
            context.close()
            log.warning("late")
        assert written.getvalue().startswith("alice ")

    def test_under_a_grant_it_is_the_one_who_acts(self, manager: UserContextManager, written: io.StringIO) -> None:
        with running_as(manager, "alice"), manager.privileged(reason="support", users=["bob"]):
            log.warning("hello")
        assert written.getvalue().startswith("alice ")

    def test_a_visitor_who_logs_in_is_named_from_then_on(
        self, manager: UserContextManager, written: io.StringIO
    ) -> None:
        stranger = visitor(manager)
        anonymous_id = stranger.user_id
        with managed_user_context(stranger):
            log.warning("before")
            stranger.bind("alice")
            log.warning("after")
        before, after = [line.split()[0] for line in written.getvalue().splitlines()]
        assert (before, after) == (anonymous_id, "alice")


class TestStructlog:
    @pytest.fixture
    def logger(self) -> structlog.typing.WrappedLogger:
        return structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=[
                structlog.contextvars.merge_contextvars,
                add_user_context,
                structlog.processors.KeyValueRenderer(),
            ],
        )

    def test_an_event_has_the_four_ids(self, logger: structlog.typing.WrappedLogger) -> None:
        context = create_isolated_execution_context("alice", "r-1", thread_id="t-1", run_id="run-1")
        with managed_user_context(context):
            line = logger.info("hello", step=2)
        assert line == "step=2 event='hello' user_id='alice' request_id='r-1' thread_id='t-1' run_id='run-1'"

    def test_outside_nothing_is_added(self, logger: structlog.typing.WrappedLogger) -> None:
        assert logger.info("hello") == "event='hello'"

    def test_what_was_bound_stays(self, manager: UserContextManager, logger: structlog.typing.WrappedLogger) -> None:
        with running_as(manager, "alice"):
            assert "user_id='impersonated'" in logger.bind(user_id="impersonated").info("hello")
