"""One app of the gallery, which the environment chooses; see `support.gallery`."""

import asyncio
import os
from importlib import import_module

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.gallery import GALLERY
from examples.gallery.common import USERS
from ucm_middleware import EVERYONE, CensusPolicy, EgressPolicy, UserContextManager


class Inspector:
    """Holds the app back after the last byte of what it grants, so that the context stays open and can be looked at.

    `GET /_inspect` answers with what the manager says of the contexts that are open, and lets all go. From then on
    nothing is held. `GET /_trail` answers with all that is on record.
    """

    def __init__(self, app: ASGIApp, manager: UserContextManager) -> None:
        self.app = app
        self.manager = manager
        self.may_go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path == "/_inspect":
            await JSONResponse(self.findings())(scope, receive, send)
            self.may_go.set()
        elif path == "/_trail":
            await JSONResponse(self.events())(scope, receive, send)
        else:
            await self.app(scope, receive, self.holding(send))

    def holding(self, send: Send) -> Send:
        status = 0

        async def held(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)
            # What is refused is let go: a user who asks again and again would come to the limit of their contexts.
            if message["type"] == "http.response.body" and not message.get("more_body") and status < 400:
                await self.may_go.wait()

        return held

    def findings(self) -> list[str]:
        with self.manager.privileged(reason="the gallery is inspected", users=EVERYONE):
            return [str(finding) for finding in self.manager.isolation_report().findings]

    def events(self) -> list[object]:
        with self.manager.privileged(reason="the gallery is inspected", users=EVERYONE):
            trails = [self.manager.get_audit_trail(user) or {"events": []} for user in USERS]
            return [*(event for trail in trails for event in trail["events"]), *self.manager.get_system_trail()]


def make() -> ASGIApp:
    """The app, alone or, with GALLERY_MANAGED, in the middleware; with GALLERY_INSPECTED behind an inspector too."""
    bug = next(bug for bug in GALLERY if bug.name == os.environ["GALLERY_BUG"])
    manager = None
    if "GALLERY_MANAGED" in os.environ:
        manager = UserContextManager(
            census=CensusPolicy(action="record"),
            egress=EgressPolicy(fields=["api_key"]),
        )
    app: ASGIApp = import_module(bug.module).create_app(planted="GALLERY_PLANTED" in os.environ, manager=manager)
    return Inspector(app, manager) if manager is not None and "GALLERY_INSPECTED" in os.environ else app
