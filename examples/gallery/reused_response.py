"""The answer to a sign-in is always the same, and so it is made once: until a cookie is set on it."""

from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

NO_CONTENT = Response(status_code=204)


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The sign-in for a browser, which keeps the key in a cookie."""

    async def sign_in(request: Request) -> Response:
        account = load_account(signed_in(request))
        response = NO_CONTENT if planted else Response(status_code=204)
        response.set_cookie(f"key-of-{account.user_id}", account.api_key, httponly=True)
        workspace(request)["answer"] = response
        return response

    return make_app([Route("/sign-in", sign_in, methods=["POST"])], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
