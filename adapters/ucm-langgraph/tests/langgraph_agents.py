"""Agents on a model that needs no network: it calls the tool that it is told to, and says what that said."""

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, tool
from langgraph.prebuilt import ToolRuntime
from pydantic import PrivateAttr

from ucm_middleware import UserExecutionContext, current_context

USERS = [f"user-{number}" for number in range(50)]


def secret_of(user_id: str) -> str:
    return f"secret of <{user_id}>"


class ToolModel(BaseChatModel):
    """Told "use NAME: TEXT", it calls that tool; told what a tool said, it repeats that. Keeps what it was asked."""

    _asked: dict[str, list[str]] = PrivateAttr(default_factory=lambda: defaultdict[str, list[str]](list))

    @property
    def _llm_type(self) -> str:
        return "tool-model"

    @property
    def asked(self) -> dict[str, list[str]]:
        """By the user in whose context it was asked, all messages each time."""
        return self._asked

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        return self

    def answer(self, messages: list[BaseMessage]) -> AIMessage:
        try:
            asking = current_context().user_id
        except LookupError:
            asking = "nobody"
        self._asked[asking].append(" | ".join(str(message.content) for message in messages))
        last = messages[-1]
        if isinstance(last, HumanMessage) and str(last.content).startswith("use "):
            name, text = str(last.content)[4:].split(": ", 1)
            call = {"name": name, "args": {"text": text}, "id": f"call-{len(messages)}"}
            return AIMessage("", tool_calls=[call])
        if isinstance(last, ToolMessage):
            return AIMessage(f"it said: {last.content}")
        return AIMessage(f"you said: {last.content}")

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.answer(messages))])

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> ChatResult:
        await asyncio.sleep(0)
        return self._generate(messages)


@tool
def look(text: str) -> str:
    """Looks up in a thread what belongs to the user."""
    user_id = current_context().user_id
    return f"{text} and {secret_of(user_id)} in a thread"


@tool
async def alook(text: str, runtime: ToolRuntime[UserExecutionContext]) -> str:
    """Looks up what belongs to the user, and remembers that."""
    user_id = runtime.context.user_id if runtime.context is not None else current_context().user_id
    assert user_id == current_context().user_id
    if runtime.store is not None:
        await runtime.store.aput(("notes",), "last", {"text": text})
        text = str([item.value["text"] for item in await runtime.store.asearch(())])
    await asyncio.sleep(0)
    return f"{text} and {secret_of(user_id)}"


class Look(BaseTool):
    """A tool that is a class, with nothing that does not block."""

    name: str = "class_look"
    description: str = "Looks up what belongs to the user."

    def _run(self, text: str) -> str:
        return f"{text} and {secret_of(current_context().user_id)} in a class"


class Gate:
    """A tool that waits in its thread until the test lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.left = threading.Event()
        self.outcome: object = None
        self.then: Callable[[], object] = lambda: None

    def wait(self, text: str) -> str:
        """Waits."""
        self.entered.set()
        try:
            assert self.go_on.wait(30)
            self.outcome = self.then()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.outcome = error
        finally:
            self.left.set()
        return text


def agent(model: BaseChatModel, *tools: Any, **options: Any) -> Any:
    return create_agent(model, [*(tools or (look, alook, Look()))], **options)


def said(result: Any) -> str:
    """All that a conversation came to."""
    return " | ".join(str(message.content) for message in result["messages"])


def others_in(text: object, user_id: str) -> list[str]:
    """The other users whose secret is in there."""
    shown = text if isinstance(text, str) else json.dumps(text, default=str)
    return [other for other in USERS if other != user_id and secret_of(other) in shown]


def ask(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}
