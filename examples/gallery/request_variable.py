"""An account is loaded once a request and kept in a ContextVar, which nobody resets: requests end, variables with them.

On a keep-alive connection they do not. After a large upload uvicorn starts every further request of the connection with
the variables of the one that uploaded (cpython#140947), whoever sends it: behind a reverse proxy, another user.
"""

from contextvars import ContextVar
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import Account, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

current_account: ContextVar[Account | None] = ContextVar("current_account", default=None)


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """A page, and uploads."""

    def my_account(request: Request) -> Account:
        user = signed_in(request)
        account = current_account.get()
        if account is None or (not planted and account.user_id != user):
            account = load_account(user)
            current_account.set(account)
        workspace(request)["account"] = account
        return account

    async def profile(request: Request) -> JSONResponse:
        return JSONResponse(my_account(request).to_json())

    async def upload(request: Request) -> JSONResponse:
        account = my_account(request)
        size = sum([len(chunk) async for chunk in request.stream()])
        return JSONResponse({**account.to_json(), "stored": size}, 201)

    return make_app([Route("/profile", profile), Route("/uploads", upload, methods=["POST"])], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
