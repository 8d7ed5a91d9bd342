"""An assistant remembers what was said to it. It is made once, when the application starts, and so is its memory."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager


@dataclass(slots=True)
class Agent:
    """Answers by what it has in its history; where a real one would ask a model, this one looks for words."""

    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def run(self, user: str, text: str) -> dict[str, Any]:
        """One turn of a conversation: looks the user up with its tool, and recalls what it was asked to."""
        seen = load_account(user).to_json() if "account" in text else None
        self.history.append({"said": text, "tool": seen})
        recalled = [turn for turn in self.history if turn["tool"]] if "remember" in text else []
        return {"reply": f"Here you are, {user}.", "found": seen, "recalled": recalled}


AGENT = Agent()
AGENTS: dict[str, Agent] = {}


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """A chat with the assistant."""

    async def chat(request: Request) -> JSONResponse:
        user = signed_in(request)
        agent = AGENT if planted else AGENTS.setdefault(user, Agent())
        workspace(request)["agent"] = agent
        return JSONResponse(agent.run(user, (await request.json())["text"]))

    return make_app([Route("/chat", chat, methods=["POST"])], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
