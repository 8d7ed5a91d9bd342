"""OwnerMiddleware: agents of LangChain that belong, with all that they remember, to the user who began with them.

Needs LangChain: ``pip install 'ucm-langgraph[langchain]'``.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, NotRequired

from ucm_langgraph.framework import require

LANGCHAIN_FLOOR: Final = (1, 5, 2)
require("langchain", LANGCHAIN_FLOOR, " for its agents")

from langchain.agents import AgentState  # noqa: E402 - asked for first
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse, ToolCallRequest  # noqa: E402
from langchain.agents.middleware.types import PrivateStateAttr  # noqa: E402
from langchain_core.messages import ToolMessage  # noqa: E402
from langgraph.runtime import Runtime  # noqa: E402
from langgraph.types import Command  # noqa: E402

from ucm_langgraph.owner import Owner  # noqa: E402
from ucm_middleware import current_context  # noqa: E402

_KIND: Final = "langgraph_agent"


class OwnedState(AgentState[Any]):
    """An agent's state, which says whose it is. No caller can give that, and none sees it."""

    ucm_owner: NotRequired[Annotated[str, PrivateStateAttr]]


class OwnerMiddleware(AgentMiddleware[OwnedState, Any, Any]):
    """For agents that an application calls itself: ``create_agent(model, tools, middleware=[OwnerMiddleware()])``.

    The user in whose context a conversation begins is kept with its state, as a derived key. In any other user's
    context it does not go on, and no model is asked and no tool called: CrossUserAccessError, recorded. Outside of a
    context: ContextNotFoundError. Give it before other middleware.

    What another user said is stored before that, in the conversation that was named: only ``OwnedCheckpointer`` keeps
    others from writing there, and from reading its state.
    """

    state_schema = OwnedState

    def before_agent(self, state: OwnedState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Keep whose it is; refuse to go on with another user's."""
        return _begin(state)

    async def abefore_agent(self, state: OwnedState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Keep whose it is; refuse to go on with another user's."""
        return _begin(state)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Ask the model, for the state's own user."""
        _check(request.state)
        return handler(request)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Ask the model, for the state's own user."""
        _check(request.state)
        return await handler(request)

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, for the state's own user."""
        _check(request.state)
        return handler(request)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, for the state's own user."""
        _check(request.state)
        return await handler(request)


def _begin(state: Any) -> dict[str, Any]:
    owner = Owner(current_context(), _KIND)
    if (found := state.get("ucm_owner")) is not None:
        owner.check(found)
    return {} if found == owner.key else {"ucm_owner": owner.key}


def _check(state: Any) -> None:
    owner = Owner(current_context(), _KIND)
    if state.get("ucm_owner") != owner.key:
        owner.check(state.get("ucm_owner"))
