"""A basket is filled by a function whose parameter has a list as its default: one list, for all calls there are."""

from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

Line = dict[str, str]


def add_line(line: Line, basket: list[Line] = []) -> list[Line]:  # noqa: B006 - the bug
    """Put a line into a basket, a new one unless one is given; so it was meant."""
    basket.append(line)
    return basket


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The basket of a shop."""

    async def order(request: Request) -> JSONResponse:
        account = load_account(signed_in(request))
        line = {"item": request.path_params["item"], "for": account.user_id, "api_key": account.api_key}
        basket = add_line(line) if planted else add_line(line, [])
        workspace(request)["basket"] = basket
        return JSONResponse(basket)

    return make_app([Route("/order/{item}", order, methods=["POST"])], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
