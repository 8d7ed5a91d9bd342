"""A model that answers offline: what it is asked decides what it says, and it remembers all that it was shown.

The SDK ships none for tests. A user's message is a line of steps, such as ``lookup(k=1); handoff to billing; say hi``:
one step for each turn, ``&`` between calls of one turn. When no step is left it says what the last tool returned.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from agents import Handoff, ModelResponse, ModelSettings, ModelTracing, Tool, Usage
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.models.interface import Model
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
)
from openai.types.responses.response_prompt_param import ResponsePromptParam

_INNER = str.maketrans("|~!", ";=~")
_CALL = re.compile(r"(\w+)\((.*)\)")


class OfflineModel(Model):
    """``before`` is awaited before each answer. ``seen`` has what each call was shown, as text, in their order."""

    def __init__(self, before: Callable[[], Any] | None = None) -> None:
        self.seen: list[str] = []
        self.answer: Callable[[list[dict[str, Any]]], str] | None = None
        self._before = before
        self._calls = 0

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> ModelResponse:
        output = await self._answer(system_instructions, input, handoffs)
        return ModelResponse(output=output, usage=Usage(requests=1), response_id=None)

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        output = await self._answer(system_instructions, input, handoffs)
        number = 0
        for item in output:
            for part in item.content if isinstance(item, ResponseOutputMessage) else ():
                if isinstance(part, ResponseOutputText):
                    for word in part.text.split(" "):
                        yield ResponseTextDeltaEvent(
                            type="response.output_text.delta",
                            content_index=0,
                            output_index=0,
                            item_id="message",
                            delta=word,
                            logprobs=[],
                            sequence_number=number,
                        )
                        number += 1
        yield ResponseCompletedEvent(
            type="response.completed",
            sequence_number=number,
            response=Response(
                id="response",
                created_at=0,
                model="offline",
                object="response",
                output=output,
                parallel_tool_calls=True,
                tool_choice="auto",
                tools=[],
            ),
        )

    async def _answer(
        self, instructions: str | None, shown: str | list[TResponseInputItem], handoffs: list[Handoff[Any, Any]]
    ) -> list[ResponseOutputItem]:
        items = [{"role": "user", "content": shown}] if isinstance(shown, str) else cast("list[dict[str, Any]]", shown)
        self.seen.append(json.dumps([instructions, items], default=str))
        if self._before is not None:
            await self._before()
        else:
            await asyncio.sleep(0)  # as a model on a network would, it lets others run
        if self.answer is not None:
            return [self._call(self.answer(items), handoffs)]
        asked = max(index for index, item in enumerate(items) if item.get("role") == "user")
        steps = [step.strip() for step in str(items[asked]["content"]).split(";")]
        since = items[asked + 1 :]
        # Each turn that has passed was one step: calls of one turn stand together.
        done = sum(
            1
            for index, item in enumerate(since)
            if item.get("type") == "function_call" and (index == 0 or since[index - 1].get("type") != "function_call")
        )
        if done < len(steps) and (step := steps[done]) and not step.startswith("say "):
            return [self._call(call.strip(), handoffs) for call in step.split("&")]
        if done < len(steps):
            return [_message(steps[done].removeprefix("say "))]
        outputs = [item["output"] for item in since if item.get("type") == "function_call_output"]
        return [_message(f"done: {outputs[-1]}" if outputs else "done")]

    def _call(self, call: str, handoffs: list[Handoff[Any, Any]]) -> ResponseFunctionToolCall:
        self._calls += 1
        if call.startswith("handoff to "):
            name = call.removeprefix("handoff to ")
            (tool_name,) = [handoff.tool_name for handoff in handoffs if handoff.agent_name == name]
            arguments: dict[str, str] = {}
        else:
            found = _CALL.fullmatch(call)
            assert found, f"no step: {call}"
            tool_name = found[1]
            # A nested agent's steps are its own: there, "|" stands for ";" and "~" for "=", and "!" one level further.
            pairs = [pair.partition("=") for pair in found[2].split(",") if pair]
            arguments = {name.strip(): value.strip().translate(_INNER) for name, _, value in pairs}
        return ResponseFunctionToolCall(
            type="function_call",
            id=f"item_{id(self)}_{self._calls}",
            call_id=f"call_{id(self)}_{self._calls}",
            name=tool_name,
            arguments=json.dumps(arguments),
        )


def _message(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id="message",
        type="message",
        role="assistant",
        status="completed",
        content=[ResponseOutputText(type="output_text", text=text, annotations=[])],
    )
