"""What an agent is given: copies, under whatever names the agent's parameters have."""

from typing import Any

from support.agents import stateless
from ucm_middleware import UserContextManager


async def test_names_of_a_contexts_fields_may_be_parameters(manager: UserContextManager) -> None:
    async def agent(**parameters: Any) -> Any:
        return parameters

    stateless(manager, talk=agent)
    given = {"thread_id": "trip-1", "run_id": 1, "user_id": "somebody", "db_session": None}
    assert await manager.execute_with_agent("alice", "talk", given) == given
