"""OwnerMiddleware: agents of LangChain that belong, with all that they remember, to the user who began with them.

Needs LangChain: ``pip install 'ucm-langgraph[langchain]'``.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, NotRequired, Self

from ucm_langgraph.framework import require

LANGCHAIN_FLOOR: Final = (1, 5, 2)
require("langchain", LANGCHAIN_FLOOR, " for its agents")

from langchain.agents import AgentState  # noqa: E402 - asked for first
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse, ToolCallRequest  # noqa: E402
from langchain.agents.middleware.types import PrivateStateAttr  # noqa: E402
from langchain_core.messages import ToolMessage  # noqa: E402
from langgraph.channels import LastValue  # noqa: E402  # pyright: ignore[reportMissingTypeStubs]
from langgraph.runtime import Runtime  # noqa: E402
from langgraph.types import Command  # noqa: E402

from ucm_langgraph.owner import Owner  # noqa: E402
from ucm_middleware import current_context  # noqa: E402

_KIND: Final = "langgraph_agent"


class OwnerChannel(LastValue[str]):
    """Whose a conversation is, as it is kept with its state. In another user's context it can neither be loaded nor
    read: LangGraph loads it before it stores anything that a call brings, and reads it where it plans a step.
    """

    __slots__ = ()

    def from_checkpoint(self, checkpoint: Any) -> Self:
        loaded = super().from_checkpoint(checkpoint)
        if loaded.is_available():
            _check(loaded.value)
        return loaded

    def get(self) -> str:
        found: str = super().get()
        _check(found)
        return found


class OwnedState(AgentState[Any]):
    """An agent's state, which says whose it is. No caller can give that, and none sees it."""

    ucm_owner: NotRequired[Annotated[str, PrivateStateAttr, OwnerChannel]]


class OwnerMiddleware(AgentMiddleware[OwnedState, Any, Any]):
    """For agents that an application calls itself: ``create_agent(model, tools, middleware=[OwnerMiddleware()])``.

    The user in whose context a conversation begins is kept with its state, as a derived key. In any other user's
    context nobody goes on with it, adds to it, answers what it waits for or reads its state, on whatever saver:
    CrossUserAccessError, recorded. Outside of a context: ContextNotFoundError.

    Of a stream that another user reads on, neither the agent's model nor its tools are called. Give this before other
    middleware: then it does not begin a turn either. Where it is in the middle of one, such as between the steps of
    two, one step of other middleware's may run as whoever reads; ``OwnerGuard`` refuses that too.
    """

    state_schema = OwnedState

    def before_agent(self, state: OwnedState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Keep whose it is, under the current secret."""
        return _kept(state)

    async def abefore_agent(self, state: OwnedState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Keep whose it is, under the current secret."""
        return _kept(state)

    def before_model(self, state: OwnedState, runtime: Runtime[Any]) -> None:
        """Begin a turn, for the state's own user: before other middleware does."""
        _check_state(state)

    async def abefore_model(self, state: OwnedState, runtime: Runtime[Any]) -> None:
        """Begin a turn, for the state's own user: before other middleware does."""
        _check_state(state)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Ask the model, for the state's own user."""
        _check_state(request.state)
        return handler(request)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Ask the model, for the state's own user."""
        _check_state(request.state)
        return await handler(request)

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, for the state's own user."""
        _check_state(request.state)
        return handler(request)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, for the state's own user."""
        _check_state(request.state)
        return await handler(request)


def _kept(state: OwnedState) -> dict[str, Any]:
    key = Owner(current_context(), _KIND).key
    return {} if state.get("ucm_owner") == key else {"ucm_owner": key}


def _check_state(state: Any) -> None:
    _check(state.get("ucm_owner"))


def _check(found: str | None) -> None:
    owner = Owner(current_context(), _KIND)
    if found != owner.key:
        owner.check(found)
