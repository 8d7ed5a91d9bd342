"""An offline model for ADK: it does what the conversation's last message says, and keeps what it was shown."""

import sys
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from typing import Any, cast

from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.genai import types
from pydantic import PrivateAttr

from ucm_middleware.current import ambient_context

if find_spec("a2a") is None:
    # ADK finds so anew in each run, by compiling a large module where bytecode is not kept: half of a test's time.
    cast("dict[str, Any]", sys.modules)["google.adk.agents.remote_a2a_agent"] = None

# ADK complains of a model that gives none.
_USAGE = types.GenerateContentResponseUsageMetadata(prompt_token_count=1, candidates_token_count=1, total_token_count=2)


class OfflineModel(BaseLlm):
    """Asks for the tools of ``calls`` one after another, each with its arguments, and then says ``answer``.

    How far it has come, it sees from the request alone, so that one instance serves many at once.
    """

    model: str = "offline"
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    answer: str = "done"
    _asked: list[tuple[str | None, str]] = PrivateAttr(default_factory=list)

    @property
    def asked(self) -> list[tuple[str | None, str]]:
        """Each request, as text, with the user whose context it came in."""
        return self._asked

    @property
    def seen(self) -> list[str]:
        """Each request, as text."""
        return [text for _, text in self._asked]

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        context = ambient_context()
        shown = llm_request.model_dump_json(include={"contents", "config"}, exclude_none=True)
        self._asked.append((None if context is None else context.user_id, shown))
        answered = 0
        for content in reversed(llm_request.contents):
            parts = content.parts or []
            if content.role == "user" and any(part.text for part in parts) and not answered_here(parts):
                break
            answered += sum(1 for part in parts if part.function_response)
        if answered < len(self.calls):
            name, arguments = self.calls[answered]
            part = types.Part.from_function_call(name=name, args=arguments)
            yield LlmResponse(content=types.Content(role="model", parts=[part]), usage_metadata=_USAGE)
            return
        if stream:
            for word in self.answer.split():
                yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text=word)]), partial=True)
        content = types.Content(role="model", parts=[types.Part(text=self.answer)])
        yield LlmResponse(content=content, usage_metadata=_USAGE)


def answered_here(parts: list[types.Part]) -> bool:
    return any(part.function_response for part in parts)
