"""A chat on a real server: each request says something in a conversation that the client names."""

import threading
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from agents import Runner, SQLiteSession
from fastapi import Body, FastAPI
from fastapi.responses import StreamingResponse
from offline_team import Team

from ucm_middleware import UserContextMiddleware, current_context
from ucm_middleware.identity import Identified
from ucm_middleware.testing.waiting import wait_until
from ucm_openai_agents import OpenAIAgents, OwnedSessions, guard_agent

Message = Annotated[str, Body(embed=True)]


def chat_of(team: Team, path: Path) -> FastAPI:
    """The application. Under ``/bare`` it does what the SDK does by itself."""
    SQLiteSession("first", path).close()  # the tables, before many want to make them
    sessions = OwnedSessions(lambda key: SQLiteSession(key, path))
    manager = team.manager(OpenAIAgents(sessions=sessions))
    guard_agent(team.front)
    app = FastAPI()

    def identify(request: Any) -> Identified:
        # For the test alone: who calls says who it is.
        return request.headers.get("user")  # type: ignore[no-any-return]

    app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)

    def answer(result: Any) -> dict[str, str]:
        return {"said": result.final_output, "history": repr(result.to_input_list())}

    @app.post("/chat/{session_id}")
    async def chat(session_id: str, message: Message) -> dict[str, str]:
        given = {"input": message, "session_id": session_id}
        return answer(await manager.execute_with_agent(current_context().user_id, "front", given))

    @app.post("/direct/{session_id}")
    async def direct(session_id: str, message: Message) -> dict[str, str]:
        """By the SDK's own Runner, in the request."""
        session = await sessions.open(session_id)
        return answer(await Runner.run(team.front, message, context=current_context(), session=session))

    @app.post("/bare/{session_id}")
    async def bare(session_id: str, message: Message) -> dict[str, str]:
        session = SQLiteSession(session_id, path)
        try:
            return answer(await Runner.run(team.front, message, context=current_context().user_id, session=session))
        finally:
            session.close()

    @app.post("/stream/{session_id}")
    async def stream(session_id: str, message: Message) -> StreamingResponse:
        user_id = current_context().user_id

        async def lines() -> AsyncIterator[str]:
            given = {"input": message, "session_id": session_id}
            async with manager.stream_with_agent(user_id, "front", given) as events:
                async for event in events:
                    yield f"{event.type}\n"
                yield f"{events.result.final_output}\n"

        return StreamingResponse(lines())

    return app


@contextmanager
def served(app: FastAPI) -> Generator[str]:
    """The URL of uvicorn, in a thread of this process: importing the SDK once more would take longer than a test."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started, "uvicorn is up")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
