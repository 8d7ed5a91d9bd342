"""The model that needs no network: a function that plays one. It calls the tools, and answers from what they gave."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

from pydantic import TypeAdapter
from pydantic_ai.messages import ModelMessage, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel
from pydantic_core import to_json

SECONDS_PER_WORD = 0.03
CHAPTERS = 200

REMEMBER = re.compile(r"(?:please\s+)?remember\s+(?:that\s+)?(?P<note>.+)", re.IGNORECASE | re.DOTALL)

Delta = str | dict[int, DeltaToolCall] | dict[int, DeltaThinkingPart]


async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Delta]:
    """What a model does in one request: ask for a tool, or answer word by word."""
    asked = [part for message in messages for part in message.parts if isinstance(part, UserPromptPart)]
    question = str(asked[-1].content)
    returned = [part for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
    if not returned:
        async for delta in use_a_tool(question):
            yield delta
        return
    for word in re.findall(r"\S+\s*", answer(question, len(asked), returned)):
        yield word
        await asyncio.sleep(SECONDS_PER_WORD)


async def use_a_tool(question: str) -> AsyncIterator[Delta]:
    """The first request of a turn."""
    if found := REMEMBER.fullmatch(question.strip()):
        yield {0: DeltaThinkingPart(content="This is something to be kept.")}
        yield {1: DeltaToolCall("remember", to_json({"note": found["note"]}).decode())}
    else:
        yield {0: DeltaThinkingPart(content="There may be something about it in the notes.")}
        yield {1: DeltaToolCall("read_notes", "{}")}


def answer(question: str, number: int, returned: Sequence[ToolReturnPart]) -> str:
    """The second request: ``returned`` is what the tool gave."""
    result = returned[0]
    if result.tool_name == "remember":
        return f"I have noted that. You have {counted(int(str(result.content)), 'note')} now."
    if "story" in question.lower():
        return story()
    notes = TypeAdapter(list[str]).validate_python(result.content)
    listed = "".join(f"\n• {note}" for note in notes)
    found = f"you have {counted(len(notes), 'note')}:{listed}" if notes else "you have no notes yet."
    return f"Question {number} in this conversation was: {question}\nAs far as I can see, {found}"


def story() -> str:
    """A long one, to be stopped."""
    return "\n".join(f"Chapter {number}. It was raining, and nobody came." for number in range(1, CHAPTERS + 1))


def counted(number: int, what: str) -> str:
    """As one says it."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


OFFLINE = FunctionModel(stream_function=stream, model_name="offline")
