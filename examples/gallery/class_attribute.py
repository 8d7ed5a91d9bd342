"""A cart keeps its items in an attribute that was meant as a declaration, and is one list of the class."""

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager


class Cart:
    """What a customer is about to buy."""

    items: list[dict[str, Any]] = []  # noqa: RUF012 - the bug

    def add(self, item: str, buyer: dict[str, Any]) -> None:
        """Put an item in."""
        self.items.append({"item": item, "buyer": buyer})


class OwnCart(Cart):
    """The same, with a list for each cart."""

    def __init__(self) -> None:
        self.items = []


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The cart of a shop."""

    async def buy(request: Request) -> JSONResponse:
        cart = Cart() if planted else OwnCart()
        workspace(request)["cart"] = cart.items
        cart.add(request.path_params["item"], load_account(signed_in(request)).to_json())
        return JSONResponse(cart.items)

    return make_app([Route("/cart/{item}", buy, methods=["POST"])], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
