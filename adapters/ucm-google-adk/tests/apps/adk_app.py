"""A chat on ADK. With ADK_APP=bare the same without the adapter: what clients say of themselves is believed."""

import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, WebSocket
from google.adk.agents.llm_agent import LlmAgent
from google.adk.apps.app import App
from google.adk.runners import Runner
from google.adk.sessions.database_session_service import DatabaseSessionService
from google.adk.tools.tool_context import ToolContext
from google.genai import types

from offline import OfflineModel
from ucm_google_adk import GoogleADK, OwnedSessionService, UserContextPlugin
from ucm_middleware import (
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
    user_context,
)

BARE = os.environ["ADK_APP"] == "bare"


async def keep(secret: str, tool_context: ToolContext) -> str:
    """Keep what the user says."""
    kept = tool_context.state.get("user:said", [])
    tool_context.state["user:said"] = [*kept, f"{current_context().user_id} in {tool_context.session.id}"]
    return f"kept for {current_context().user_id}"


model = OfflineModel(calls=(("keep", {"secret": "it"}),), answer="I have it")
agent = LlmAgent(name="chat", model=model, tools=[keep], instruction="Said: {user:said?}")
service = DatabaseSessionService(os.environ["ADK_DATABASE"], pool_size=10)
adk = GoogleADK("chat", session_service=service)
manager = UserContextManager(plugins=[adk])
manager.register_agent("chat", lambda context: agent, stateless=True)
runner = Runner(
    app=App(name="chat", root_agent=agent, plugins=[] if BARE else [UserContextPlugin()]),
    session_service=service if BARE else OwnedSessionService(service),
    auto_create_session=True,
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await service.prepare_tables()
    yield
    await service.close()


app = FastAPI(lifespan=lifespan)
app.add_middleware(UserContextMiddleware, manager=manager, identify=lambda connection: connection.headers.get("user"))
Running = Annotated[UserExecutionContext, Depends(user_context)]


@app.post("/chat/{session_id}")
async def chat(context: Running, session_id: str, message: str) -> dict[str, Any]:
    answer = await manager.execute_with_agent(context.user_id, "chat", {"message": message, "session_id": session_id})
    asked = [text for user, text in model.asked if user == context.user_id]
    return {"user": context.user_id, "text": answer.text, "asked": asked[-1]}


@app.post("/direct/{session_id}")
async def direct(session_id: str, message: str, claims: Annotated[str, Header()]) -> dict[str, Any]:
    """An endpoint that takes the client's word for who it is."""
    content = types.Content(role="user", parts=[types.Part(text=message)])
    async with aclosing(runner.run_async(user_id=claims, session_id=session_id, new_message=content)) as events:
        shown = [event.model_dump_json() async for event in events]
    asked = [text for user, text in model.asked if user == current_context().user_id]
    return {"events": shown, "asked": asked[-1]}


@app.websocket("/events")
async def events(websocket: WebSocket) -> None:
    await websocket.accept()
    async for _ in websocket.iter_text():
        pass
