"""A run that is out of time ends in AgentTimeoutError, whoever noticed first."""

import time

import pytest

from ucm_middleware import AgentTimeoutError, UserContextManager, current_context


async def test_a_run_that_uses_its_context_after_its_time_before_the_timer_came_up() -> None:
    manager = UserContextManager()

    async def agent() -> None:
        end = time.monotonic() + 0.02
        while time.monotonic() < end:  # the event loop is kept from its timers
            pass
        current_context().derive_key("thread", "1")

    manager.register_agent("busy", lambda context: lambda: agent())
    with pytest.raises(AgentTimeoutError, match="busy"):
        await manager.execute_with_agent("alice", "busy", timeout=0.001)
