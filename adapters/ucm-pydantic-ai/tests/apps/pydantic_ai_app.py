"""A chat on a real server: one agent and one store for all, and a model that repeats all that it was told."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, FastAPI
from fastapi.responses import StreamingResponse
from pydantic_ai import Agent, AgentRunResultEvent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from starlette.requests import HTTPConnection

from ucm_middleware import (
    AgentPolicy,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
)
from ucm_pydantic_ai import PydanticAI, SQLiteConversationStore

store = SQLiteConversationStore(os.environ["CHAT_FILE"])
plugin = PydanticAI(conversations=store)
manager = UserContextManager(plugins=[plugin], agents=AgentPolicy(max_runs_per_user=10))


def prompts(messages: list[ModelMessage]) -> list[str]:
    """What the user said."""
    parts = [part for message in messages for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, UserPromptPart)]


def said(messages: list[ModelMessage]) -> str:
    """All that the model is given to read, but for its own answers."""
    parts = [part for message in messages for part in message.parts]
    returned = [str(part.content) for part in parts if isinstance(part, ToolReturnPart)]
    return " | ".join(prompts(messages) + returned)


def is_new(messages: list[ModelMessage]) -> bool:
    return messages[-1].parts[0].part_kind == "user-prompt"


def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    if is_new(messages):
        return ModelResponse(parts=[ToolCallPart(tool, {}) for tool in ("on_the_loop", "in_a_thread")])
    return ModelResponse(parts=[TextPart(said(messages))])


async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
    if is_new(messages):
        for index, tool in enumerate(("on_the_loop", "in_a_thread")):
            yield {index: DeltaToolCall(tool, "{}")}
    else:
        for word in said(messages).split(" "):
            yield f"{word} "


agent = Agent(FunctionModel(answer, stream_function=stream), deps_type=UserExecutionContext)


@agent.tool
async def on_the_loop(ctx: RunContext[UserExecutionContext]) -> str:
    return f"loop of {ctx.deps.user_id}"


@agent.tool
def in_a_thread(ctx: RunContext[UserExecutionContext]) -> str:
    return f"thread of {current_context().user_id}"


manager.register_agent("chat", lambda context: agent, stateless=True)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await store.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(prompt: Annotated[str, Body(embed=True)]) -> str:
    asked = {"prompt": prompt, "conversation_id": "main"}
    result = await manager.execute_with_agent(current_context().user_id, "chat", asked)
    return str(result.output)


@app.post("/stream")
async def chat_as_a_stream(prompt: Annotated[str, Body(embed=True)]) -> StreamingResponse:
    asked = {"prompt": prompt, "conversation_id": "main"}
    user_id = current_context().user_id

    async def body() -> AsyncIterator[str]:
        async with manager.stream_with_agent(user_id, "chat", asked) as events:
            async for event in events:
                yield "."
                if isinstance(event, AgentRunResultEvent):
                    yield str(event.result.output)

    return StreamingResponse(body(), media_type="text/plain")


@app.get("/history")
async def history() -> list[str]:
    assert plugin.conversations is not None
    conversation = await plugin.conversations.load("main")
    return [] if conversation is None else prompts(conversation.messages)


def identify(connection: HTTPConnection) -> str | None:
    return connection.headers.get("user")  # for the test alone: who calls says who it is


app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)
