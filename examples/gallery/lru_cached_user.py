"""Who is calling stands in a ContextVar, and a function that reads it got an ``lru_cache``, since it was slow."""

from contextvars import ContextVar
from functools import lru_cache, partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import Account, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

current_user: ContextVar[str] = ContextVar("current_user")


@lru_cache
def current_account() -> Account:
    """The caller's account, whoever that was when it was first asked for."""
    return load_account(current_user.get())


@lru_cache
def account_of(user: str) -> Account:
    """The account of a user: what it depends on is a parameter, and so part of the key."""
    return load_account(user)


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The customer's own page."""

    async def profile(request: Request) -> JSONResponse:
        current_user.set(signed_in(request))
        account = current_account() if planted else account_of(current_user.get())
        workspace(request)["account"] = account
        return JSONResponse(account.to_json())

    return make_app([Route("/profile", profile)], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
