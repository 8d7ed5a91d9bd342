"""What the apps of the promises have in common: a journal of what happened, gates, and a door for the test.

The door stands outside of the product's middleware: what a test reads there is the state of the server, and reading it
opens no context.
"""

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from ucm_middleware import EVERYONE, UserContextManager

PATIENCE = 15.0
"""Seconds until a thread gives up waiting at a gate; only a hang gets there."""


class Gate:
    """Holds whoever comes until the test, or the app on its loop, opens it."""

    def __init__(self) -> None:
        self._for_tasks = asyncio.Event()
        self._for_threads = threading.Event()

    def open(self) -> None:
        self._for_tasks.set()
        self._for_threads.set()

    async def passed(self) -> None:
        await self._for_tasks.wait()

    def passed_in_thread(self) -> None:
        assert self._for_threads.wait(PATIENCE), "nobody opened the gate"


class Journal:
    """What happened in this process, in order. With JOURNAL in the environment, it is written to that file too."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._gates: dict[str, Gate] = {}
        self._all_open = False
        self._file = Path(os.environ["JOURNAL"]) if "JOURNAL" in os.environ else None

    def note(self, what: str, **details: Any) -> None:
        """Write down, from any thread, that something happened."""
        entry = {"what": what, **details}
        self.entries.append(entry)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def gate(self, name: str) -> Gate:
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = Gate()
            if self._all_open:
                gate.open()
        return gate

    def open_all(self) -> None:
        """Hold nobody any more, so that whatever a test left behind can end."""
        self._all_open = True
        for gate in self._gates.values():
            gate.open()

    def reset(self) -> None:
        self.entries.clear()
        self._gates.clear()
        self._all_open = False


class Door:
    """Answers paths under `/door/` for the test, and hands everything else to the app. Add it last: it is outermost."""

    def __init__(
        self, app: ASGIApp, *, manager: UserContextManager, journal: Journal, routes: Sequence[BaseRoute] = ()
    ) -> None:
        self.app = app
        self.manager = manager
        self.journal = journal
        self.routes = Router(
            [
                Route("/door/journal", self._journal),
                Route("/door/reset", self._reset, methods=["POST"]),
                Route("/door/open", self._open_all, methods=["POST"]),
                Route("/door/open/{gate}", self._open, methods=["POST"]),
                Route("/door/active", self._active),
                Route("/door/trail/{user}", self._trail),
                Route("/door/system-trail", self._system_trail),
                *routes,
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        through_the_door = scope["type"] == "http" and scope["path"].startswith("/door/")
        await (self.routes if through_the_door else self.app)(scope, receive, send)

    async def _journal(self, request: Request) -> JSONResponse:
        return JSONResponse(self.journal.entries)

    async def _reset(self, request: Request) -> JSONResponse:
        self.journal.reset()
        return JSONResponse(None)

    async def _open_all(self, request: Request) -> JSONResponse:
        self.journal.open_all()
        return JSONResponse(None)

    async def _open(self, request: Request) -> JSONResponse:
        self.journal.gate(request.path_params["gate"]).open()
        return JSONResponse(None)

    async def _active(self, request: Request) -> JSONResponse:
        with self.manager.privileged(reason="the test counts", users=EVERYONE):
            return JSONResponse(list(self.manager.get_active_contexts().values()))

    async def _trail(self, request: Request) -> JSONResponse:
        user = request.path_params["user"]
        with self.manager.privileged(reason="the test reads", users=EVERYONE):
            return JSONResponse(self.manager.get_audit_trail(user))

    async def _system_trail(self, request: Request) -> JSONResponse:
        with self.manager.privileged(reason="the test reads", users=EVERYONE):
            return JSONResponse(self.manager.get_system_trail())
