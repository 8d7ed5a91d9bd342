"""What users call with: their headers, the cookies that they were given, and the token of their last sign-in."""

import json
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode

from ucm_middleware.certify.cast import Call, User
from ucm_middleware.certify.lines.answer import Answer
from ucm_middleware.certify.lines.request import Request


class Credentials:
    """Of one user."""

    __slots__ = ("_cookies", "_token", "user")

    def __init__(self, user: User) -> None:
        self.user = user
        self._cookies: dict[str, str] = {}
        self._token: str | None = None

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Those of the next request."""
        made = [*self.user.headers.items()]
        if self._token is not None:
            made.append(("Authorization", f"Bearer {self._token}"))
        if self._cookies:
            made.append(("Cookie", "; ".join(f"{name}={value}" for name, value in self._cookies.items())))
        return tuple(made)

    def keep(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep the cookies of an answer, as a browser does."""
        for name, value in headers:
            if name.lower() == b"set-cookie":
                self._keep_cookie(value.decode("latin-1"))

    def _keep_cookie(self, text: str) -> None:
        jar = SimpleCookie()
        try:
            jar.load(text)
        except CookieError:
            return
        for name, morsel in jar.items():
            if morsel["max-age"] == "0" or "1970" in morsel["expires"]:
                self._cookies.pop(name, None)
            else:
                self._cookies[name] = morsel.coded_value

    def signed_in(self, call: Call, answer: Answer) -> str | None:
        """Keep what a sign-in brought. Returns what is wrong with the answer, or None."""
        self.keep(answer.headers)
        if not 200 <= answer.status < 400:
            return f"is answered with {answer.status or 'nothing'}"
        if call.token is None:
            return None
        try:
            token = json.loads(answer.body)[call.token]
        except (ValueError, KeyError, TypeError):
            return f"has no {call.token!r} in its answer"
        self._token = str(token)
        return None

    def sign_out(self) -> None:
        """Forget what the sign-in brought."""
        self._token = None
        self._cookies.clear()

    def call(self, call: Call) -> Request:
        """The request by which this user signs in or out."""
        headers = [*self.headers()]
        body = None
        if call.form is not None:
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
            body = urlencode(call.form).encode()
        elif call.body is not None:
            headers.append(("Content-Type", "application/json"))
            body = json.dumps(call.body).encode()
        return Request(call.method, call.path, tuple(headers), body)
