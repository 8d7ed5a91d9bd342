"""Middleware of Django's, for ``MIDDLEWARE``: Django's login as the identity of the context."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from ucm_django.identity import nobody
from ucm_middleware import Principal, UserContextError, current_context
from ucm_middleware.refusal import refusal_for

GetResponse = Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]


class BindUserMiddleware:
    """Gives the request's context the user of Django's AuthenticationMiddleware, which stands before it.

    The session and the account are read as nobody; from then on statements run for the user. Who is not logged in
    stays anonymous, and statements are refused unless ``UCM_ANONYMOUS`` is "nobody". Where the ASGI middleware knew
    the user before, it has to be the same.

    What this package raises in a view, or here, is answered by the table in the README of ucm-middleware.

    Raises ContextNotFoundError where UserContextMiddleware is not around Django.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response: Any = get_response
        # On Python 3.11, asgiref has a mark of its own.
        self._is_async = iscoroutinefunction(get_response)  # pyright: ignore[reportDeprecated]
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._acall(request)
        with nobody():
            user: Any = request.user
            user_id = str(user.pk) if user.is_authenticated else None
        refused = _bind(user_id)
        if refused is not None:
            return refused
        response: HttpResponseBase = self.get_response(request)
        return response

    async def _acall(self, request: HttpRequest) -> HttpResponseBase:
        with nobody():
            user: Any = await request.auser()
            user_id = str(user.pk) if user.is_authenticated else None
        refused = _bind(user_id)
        if refused is not None:
            return refused
        response: HttpResponseBase = await self.get_response(request)
        return response

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Django's hook for what a view raises."""
        return answer(exception)


def answer(error: Exception) -> HttpResponse | None:
    """What a client is told of an error of ucm-middleware's; None for one that is the application's own."""
    refusal = refusal_for(error)
    if refusal is None:
        return None
    response = HttpResponse(
        json.dumps({"detail": refusal.detail}), status=refusal.status, content_type="application/json"
    )
    response["Cache-Control"] = "no-store"
    for name, value in refusal.headers:
        response[name.decode()] = value.decode()
    return response


def bind_logged_in(*, user: Any, **_: object) -> None:
    """Receives Django's signal ``user_logged_in``: what comes after ``login()`` in the same request runs for the user.

    Where the request has another user already, it keeps that one; the next request has the new one.
    """
    context = current_context()
    if context.is_anonymous:
        context.bind(Principal(str(user.pk)))


def _bind(user_id: str | None) -> HttpResponse | None:
    context = current_context()
    if user_id is None:
        return None
    try:
        context.bind(Principal(user_id))
    except UserContextError as error:
        refused = answer(error)
        if refused is None:
            raise
        return refused
    return None
