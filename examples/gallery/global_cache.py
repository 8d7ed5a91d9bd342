"""A dashboard that is slow to draw up, and so is cached. The key of the cache says what was asked for, not by whom."""

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

CACHE: dict[Any, dict[str, Any]] = {}


def draw_up(user: str, period: str) -> dict[str, Any]:
    """The slow part: many queries, in an application that is not an example."""
    orders = [f"{user}'s order {number}" for number in (1, 2)]
    return {"period": period, "account": load_account(user).to_json(), "orders": orders}


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The shop's dashboard."""

    async def dashboard(request: Request) -> JSONResponse:
        user, period = signed_in(request), request.path_params["period"]
        key = period if planted else (user, period)
        if key not in CACHE:
            CACHE[key] = draw_up(user, period)
        workspace(request)["dashboard"] = CACHE[key]
        return JSONResponse(CACHE[key])

    return make_app([Route("/dashboard/{period}", dashboard)], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
