"""A chat: each user talks to an agent that the application registers, and to one that it calls itself."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import environ
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

sys.path.insert(0, str(Path(__file__).parents[1]))

from langgraph_agents import ToolModel, agent, ask, others_in, said
from ucm_langgraph import LangGraph, OwnedCheckpointer, OwnerGuard
from ucm_middleware import AgentPolicy, UserContextManager, UserContextMiddleware, current_context

model = ToolModel()
graph = agent(model)
bare = agent(ToolModel())
manager = UserContextManager(plugins=[LangGraph()], agents=AgentPolicy(max_runs_per_user=10))
manager.register_agent("talk", lambda _: graph, stateless=True)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    folder = Path(environ["CHAT_FOLDER"])
    async with (
        AsyncSqliteSaver.from_conn_string(str(folder / "owned.db")) as saver,
        AsyncSqliteSaver.from_conn_string(str(folder / "bare.db")) as bare_saver,
    ):
        graph.checkpointer = OwnedCheckpointer(saver)
        bare.checkpointer = bare_saver
        yield


app = FastAPI(lifespan=lifespan)


def identify(request: Any) -> str | None:
    # For the test alone: who calls says who it is.
    return request.headers.get("user")  # type: ignore[no-any-return]


app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)


@app.post("/run/{thread_id}")
async def run(thread_id: str, request: Request) -> str:
    text = (await request.body()).decode()
    given = {"input": ask(text), "thread_id": thread_id}
    return said(await manager.execute_with_agent(current_context().user_id, "talk", given))


@app.post("/direct/{thread_id}")
async def direct(thread_id: str, request: Request) -> str:
    text = (await request.body()).decode()
    config: Any = {"configurable": {"thread_id": thread_id}, "callbacks": [OwnerGuard(current_context())]}
    return said(await graph.ainvoke(ask(text), config))


@app.post("/bare/{thread_id}")
async def as_langgraph_has_it(thread_id: str, request: Request) -> str:
    text = (await request.body()).decode()
    return said(await bare.ainvoke(ask(text), {"configurable": {"thread_id": thread_id}}))


@app.post("/stream/{thread_id}")
async def stream(thread_id: str, request: Request) -> StreamingResponse:
    text = (await request.body()).decode()
    given = {"input": ask(text), "thread_id": thread_id, "stream_mode": "updates"}

    async def lines() -> AsyncIterator[str]:
        async with manager.stream_with_agent(current_context().user_id, "talk", given) as items:
            async for item in items:
                yield f"{item}\n"

    return StreamingResponse(lines())


@app.get("/state/{thread_id}")
async def state(thread_id: str) -> str:
    found = await graph.aget_state({"configurable": {"thread_id": thread_id}})
    return said(found.values) if found.values else ""


@app.get("/asked")
async def asked() -> dict[str, list[str]]:
    return {user_id: others_in(texts, user_id) for user_id, texts in model.asked.items()}
