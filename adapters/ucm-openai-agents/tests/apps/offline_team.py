"""A team of agents for tests: one that users talk to, one that it asks as a tool, and one that it hands over to."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from agents import Agent, RunContextWrapper, function_tool
from offline_model import OfflineModel

from ucm_middleware import ContextNotFoundError, UserContextManager, UserExecutionContext, current_run
from ucm_openai_agents import OpenAIAgents

SECRET = "mP0bq3vY8nTzK1xW5sLcR7dHjE2uF9aG4iQo6tVyXkM"
EVERYTHING = "recall() & arecall(); ask(input=recall()|arecall()); handoff to billing; recall() & arecall()"
"""Each kind of tool, a sub-agent and a hand-off, as one message."""


SECRETS = re.compile(r"<secret of ([^>]*)>")
"""Finds whose secrets are in a text."""


def secret_of(user_id: str) -> str:
    """What nobody but this user may see."""
    return f"<secret of {user_id}>"


def user_of(context: object) -> str:
    """Bare, the context that is given to the SDK is the user's id."""
    return context.user_id if isinstance(context, UserExecutionContext) else str(context)


@dataclass
class Team:
    """``front`` is whom users talk to. ``called`` says who had which tool called, as whom."""

    model: OfflineModel = field(default_factory=OfflineModel)
    called: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def __post_init__(self) -> None:
        @function_tool
        def recall(wrapper: RunContextWrapper[Any]) -> str:
            """What the user knows."""
            return self._recall("recall", wrapper)

        @function_tool
        async def arecall(wrapper: RunContextWrapper[Any]) -> str:
            """What the user knows."""
            return self._recall("arecall", wrapper)

        tools = [recall, arecall]
        self.billing = Agent("billing", model=self.model, tools=[*tools])
        self.helper = Agent("helper", model=self.model, tools=[*tools])
        self.front = Agent(
            "front",
            model=self.model,
            tools=[*tools, self.helper.as_tool("ask", "asks the helper")],
            handoffs=[self.billing],
        )

    def manager(self, plugin: OpenAIAgents, **settings: Any) -> UserContextManager:
        """One that knows the agent ``front``."""
        manager = UserContextManager(plugins=[plugin], secret=SECRET, **settings)
        manager.register_agent("front", lambda _: self.front, stateless=True)
        return manager

    def _recall(self, tool: str, wrapper: RunContextWrapper[Any]) -> str:
        user_id = user_of(wrapper.context)
        self.called.append((tool, user_id))
        with suppress(ContextNotFoundError):  # where Runner is called by itself
            current_run().emit("recalled", {"secret": secret_of(current_run().context.user_id)})
        return secret_of(user_id)
