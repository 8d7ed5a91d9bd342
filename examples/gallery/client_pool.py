"""Clients of a payment service sign in once, as one customer, and are then kept in a pool: for whoever is next."""

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import Account, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager


class PaymentClient:
    """A connection to the payment service, signed in as the account that it was opened for."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self.calls: list[str] = []

    def methods(self) -> dict[str, Any]:
        """The customer's means of payment, as the service has them."""
        self.calls.append("methods")
        return {"cards": [f"card of {self._account.user_id}"], "account": self._account.to_json()}


class ClientPool:
    """Keeps clients that nobody uses, since signing in takes a second."""

    def __init__(self) -> None:
        self._idle: dict[str, list[PaymentClient]] = {}

    def take(self, key: str, user: str) -> PaymentClient:
        """A client: one that is idle, or else a new one."""
        idle = self._idle.get(key)
        return idle.pop() if idle else PaymentClient(load_account(user))

    def give_back(self, key: str, client: PaymentClient) -> None:
        """Keep it for who comes next."""
        self._idle.setdefault(key, []).append(client)


POOL = ClientPool()


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The page before a payment."""

    async def checkout(request: Request) -> JSONResponse:
        user = signed_in(request)
        key = "payments.example" if planted else user
        client = POOL.take(key, user)
        workspace(request)["payments"] = client
        try:
            return JSONResponse(client.methods())
        finally:
            POOL.give_back(key, client)

    return make_app([Route("/checkout", checkout)], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
