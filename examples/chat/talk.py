"""What is said over a WebSocket: questions and "stop" from the page, and answers, piece by piece, to it."""

import asyncio
import logging
from asyncio import Task, TaskGroup
from typing import Annotated, Literal

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

from ucm_middleware import InvalidContextError, UserContextError, UserContextManager, UserExecutionContext
from ucm_middleware.websocket.starlette import messages

logger = logging.getLogger(__name__)


class Ask(BaseModel):
    """A question. ``turn`` is what the page calls it, and all that is said to it has it."""

    type: Literal["ask"]
    turn: str = Field(min_length=1, max_length=64)
    conversation: str
    text: str = Field(min_length=1, max_length=4000)


class Stop(BaseModel):
    """The answer is not wanted any more."""

    type: Literal["stop"]


SAID: TypeAdapter[Ask | Stop] = TypeAdapter(Annotated[Ask | Stop, Field(discriminator="type")])


class Talk:
    """One connection's. A connection has one question at a time; the same user's others have theirs."""

    def __init__(self, manager: UserContextManager, websocket: WebSocket, context: UserExecutionContext) -> None:
        self._manager = manager
        self._websocket = websocket
        self._user_id = context.user_id
        self._turn = ""
        self._answering: Task[None] | None = None

    async def go_on(self) -> None:
        """Until the client goes. An answer that is under way ends with it."""
        async with TaskGroup() as tasks:
            async for message in messages(self._websocket, "json"):
                try:
                    said = SAID.validate_python(message)
                except ValidationError as error:
                    await self._say("refused", problem=_told(error))
                    continue
                match said:
                    case Stop():
                        await self._stop()
                    case Ask() if self._answering is None or self._answering.done():
                        self._turn = said.turn
                        self._answering = tasks.create_task(self._answer(said))
                    case Ask():
                        await self._say("refused", said.turn, problem="There is a question under way: stop it first.")
            if self._answering is not None:
                self._answering.cancel()

    async def _stop(self) -> None:
        answering = self._answering
        if answering is None or answering.done():
            return  # the answer was on its way already
        answering.cancel()  # and the run of the agent with it
        await asyncio.wait([answering])
        if answering.cancelled():
            await self._say("stopped", self._turn)

    async def _answer(self, asked: Ask) -> None:
        parameters = {"prompt": asked.text, "conversation_id": asked.conversation}
        try:
            async with self._manager.stream_with_agent(self._user_id, "assistant", parameters) as stream:
                async for event in stream:
                    if text := _text_in(event):
                        await self._say("token", asked.turn, text=text)
            await self._say("answer", asked.turn, text=str(stream.result.output))
        except WebSocketDisconnect:
            return  # whoever asked has gone
        except InvalidContextError as error:
            await self._say("failed", asked.turn, problem=f"The name of the conversation: {error.rule}.")
        except UserContextError as error:
            await self._say("failed", asked.turn, problem=str(error))
        except Exception as error:
            logger.exception("a question could not be answered")
            await self._say("failed", asked.turn, problem=f"{type(error).__name__}; the server's log says more.")

    async def _say(self, kind: str, turn: str | None = None, **more: str) -> None:
        await self._websocket.send_json({"type": kind, "turn": turn, **more})


def _text_in(event: object) -> str:
    """What an event of the framework's adds to the answer, if anything."""
    match event:
        case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
            return text
        case _:
            return ""


def _told(error: ValidationError) -> str:
    # Where it is and what is wrong with it; not what it was.
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(filter(None, [".".join(map(str, found["loc"])), found["msg"]]))
