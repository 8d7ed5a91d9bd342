"""What users call with: their headers, the cookies that they were given, and the token of their last sign-in."""

import json
from collections.abc import Iterable, Mapping, MutableSequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_plus, urlencode

from ucm_middleware.certify.cast import Call, User
from ucm_middleware.certify.lines.answer import Answer
from ucm_middleware.certify.lines.request import Request

Given = MutableSequence[str]
"""Values that answers gave to users, for whoever must not say them."""


class Credentials:
    """Of one user. What answers give is added to ``given``."""

    __slots__ = ("_cookies", "_given", "_token", "user")

    def __init__(self, user: User, given: Given) -> None:
        self.user = user
        self._given = given
        self._cookies: dict[tuple[str, str], str] = {}  # by name and path
        self._token: str | None = None

    def headers(self, target: str) -> tuple[tuple[str, str], ...]:
        """Those of a request that goes there."""
        made = {name.lower(): (name, value) for name, value in self.user.headers.items()}
        if self._token is not None:
            made["authorization"] = ("Authorization", f"Bearer {self._token}")
        if cookies := self._cookies_for(target.partition("?")[0]):
            if "cookie" in made:
                cookies.insert(0, made["cookie"][1])
            made["cookie"] = ("Cookie", "; ".join(cookies))
        return tuple(made.values())

    def _cookies_for(self, path: str) -> list[str]:
        """Those of longer paths first."""
        fitting = [(name, at, value) for (name, at), value in self._cookies.items() if _is_below(path, at)]
        return [f"{name}={value}" for name, _, value in sorted(fitting, key=lambda one: -len(one[1]))]

    def target(self, target: str) -> str:
        """Where a request goes, with the user's own in the query, and nothing else under those names."""
        own = self.user.query
        if not own:
            return target
        path, _, query = target.partition("?")
        made = [pair for pair in query.split("&") if pair and unquote_plus(pair.partition("=")[0]) not in own]
        return f"{path}?{'&'.join([*made, urlencode(own)])}"

    def keep(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep the cookies of an answer, as a browser does."""
        for name, value in headers:
            if name.lower() == b"set-cookie":
                self._keep_cookie(value.decode("latin-1"))

    def _keep_cookie(self, text: str) -> None:
        pair, *attributes = text.split(";")
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            return
        said = {key.strip().lower(): text.strip() for key, _, text in (each.partition("=") for each in attributes)}
        path = said.get("path", "")
        key = name, path if path.startswith("/") else "/"
        if _is_over(said):
            self._cookies.pop(key, None)
        else:
            self._cookies[key] = value
            self._note(value)

    def _note(self, value: str) -> None:
        if value not in self._given:
            self._given.append(value)

    def signed_in(self, call: Call, answer: Answer) -> str | None:
        """Keep what a sign-in brought. Returns what is wrong with the answer, or None."""
        self.keep(answer.headers)
        if not 200 <= answer.status < 400:
            return f"is answered with {answer.status or 'nothing'}"
        if call.token is None:
            return None
        try:
            token = json.loads(answer.body)[call.token]
        except (ValueError, KeyError, TypeError, RecursionError):
            return f"has no {call.token!r} in its answer"
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            return f"has under {call.token!r} something else than a text that can be sent in a header"
        self._token = token
        self._note(token)
        return None

    def call(self, call: Call, headers: Iterable[tuple[str, str]]) -> Request:
        """The request by which this user signs in or out."""
        headers = [*headers]
        body = None
        if call.form is not None:
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
            body = urlencode(call.form).encode()
        elif call.body is not None:
            headers.append(("Content-Type", "application/json"))
            body = json.dumps(call.body).encode()
        return Request(call.method, call.path, tuple(headers), body)


def _is_below(path: str, where: str) -> bool:
    """Whether a cookie of the path ``where`` is sent to ``path``."""
    return path == where or path.startswith(where if where.endswith("/") else f"{where}/")


def _is_over(said: Mapping[str, str]) -> bool:
    """Whether a cookie's attributes say that it is to be forgotten. Max-Age goes before Expires."""
    with suppress(ValueError, TypeError):  # what cannot be read is as if it were not there
        if "max-age" in said:
            return int(said["max-age"]) <= 0
        if "expires" in said:
            until = parsedate_to_datetime(said["expires"])
            return (until if until.tzinfo else until.replace(tzinfo=UTC)) <= datetime.now(UTC)
    return False
