"""Deadlines on an event loop whose timers are early."""

import asyncio
from typing import Any

import pytest

from support.agents import Waiting, stateless
from ucm_middleware import AgentTimeoutError, UserContextManager


async def test_a_timer_that_fires_before_its_time_is_the_deadline_all_the_same(
    manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As uvloop's do, which know the time to the millisecond."""
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def early(delay: float, callback: Any, *args: Any, **settings: Any) -> asyncio.TimerHandle:
        return call_later(0 if delay == 30.0 else delay, callback, *args, **settings)

    monkeypatch.setattr(loop, "call_later", early)
    stateless(manager, agent=Waiting())
    with pytest.raises(AgentTimeoutError, match="within 30 seconds"):
        await manager.execute_with_agent("alice", "agent", timeout=30.0)
