"""An async generator signs in at the bookkeeping, and out again in its ``finally``: which runs when it has ended.

Readers take a page at a time, and the generator waits in between. One that is never read to its end stays signed in.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import Account, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

Page = dict[str, Any]


class Bookkeeping:
    """The bookkeeping system, which takes one sign-in at a time."""

    def __init__(self) -> None:
        self.account: Account | None = None

    async def statements(self, user: str) -> AsyncGenerator[Page]:
        """The statements of a user, a page at a time, the newest first."""
        if self.account is None:
            self.account = load_account(user)
        try:
            for number in (3, 2, 1):
                yield {"page": number, "account": self.account}
        finally:
            self.account = None


async def replayed(pages: Iterable[Page]) -> AsyncGenerator[Page]:
    """Pages that were all read before."""
    for page in pages:
        yield page


BOOKKEEPING = Bookkeeping()
READERS: dict[str, AsyncIterator[Page]] = {}


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """Statements, a page at a time."""

    async def next_page(request: Request) -> JSONResponse:
        user = signed_in(request)
        if user not in READERS:
            pages = BOOKKEEPING.statements(user)
            READERS[user] = pages if planted else replayed([page async for page in pages])
        page = await anext(READERS[user], None)
        if page is None:
            del READERS[user]
            return JSONResponse({"page": None})
        workspace(request)["page"] = page
        return JSONResponse({"page": page["page"], "account": page["account"].to_json()})

    return make_app([Route("/statements/next", next_page)], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
