"""Who takes part in a run: users with what they call with and what only they may see, and the routes that are given."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final, Literal

from ucm_middleware.certify.witness.wire import NUMBER, USER
from ucm_middleware.errors import ConfigurationError

SHORTEST_SECRET: Final = 8
"""Characters. What is shorter may stand in an answer by chance."""

_MOST_USERS: Final = 256
"""As many as a canary has numbers for."""

_OURS: Final = frozenset({"connection", "content-length", "transfer-encoding", "content-type", NUMBER, USER})
"""Headers that are made for each request."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_CREDENTIALS: Final = frozenset({"authorization", "cookie", "x-api-key"})
_QUERY_CREDENTIALS: Final = frozenset({"token", "access_token", "api_key", "key"})

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
METHODS: Final[tuple[Method, ...]] = ("GET", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, slots=True)
class Call:
    """A request by which a user signs in or out. ``body`` is sent as JSON, ``form`` as a form's fields.

    ``token`` names the field of the JSON answer that is sent as a bearer token from then on; cookies are kept without.

    Raises ConfigurationError for what cannot be sent.
    """

    path: str
    method: Method = "POST"
    body: Any = field(default=None, repr=False)
    form: Mapping[str, str] | None = field(default=None, repr=False)
    token: str | None = None

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or not self.path.isascii() or not self.path.isprintable() or " " in self.path:
            raise ConfigurationError(
                "users: the path of a sign-in or sign-out begins with a slash and has visible ASCII characters only; "
                "quote what is else"
            )
        _check_method("users: a sign-in's or sign-out's method", self.method)
        if self.body is not None and self.form is not None:
            raise ConfigurationError("users: a sign-in or sign-out has body or form, not both")
        try:
            json.dumps(self.body)
        except (TypeError, ValueError):
            raise ConfigurationError("users: the body of a sign-in or sign-out must be what JSON can say") from None

    @property
    def key(self) -> str:
        """ "POST /login": that of the route, as a given one's."""
        return f"{self.method} {self.path.partition('?')[0]}"


@dataclass(frozen=True, slots=True)
class User:
    """A user of the application that is tried. ``headers`` go with each request, credentials for example; so do the
    names and values of ``query``, in the request's query.

    ``secrets`` are canaries that the application has already: texts that this user may see, and no other one.

    Raises ConfigurationError for a secret of less than eight characters, and headers that HTTP cannot have.
    """

    name: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    sign_in: Call | None = None
    sign_out: Call | None = None
    query: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name:
            raise ConfigurationError(f"users: a name must be printable and not empty, not {self.name!r}")
        if any(len(secret) < SHORTEST_SECRET for secret in self.secrets):
            raise ConfigurationError(
                f"users: {self.name} has a secret of less than {SHORTEST_SECRET} characters, which may stand in an "
                "answer by chance; give a longer one"
            )
        for name, value in self.headers.items():
            _check_header(self.name, name, value)
        if not all(_is_text(each) for pair in self.query.items() for each in pair):
            raise ConfigurationError(f"users: query of {self.name}: names and values must be texts")


@dataclass(frozen=True, slots=True)
class Given:
    """A route that is given, in place of what the application's schema says of it or in addition.

    ``path`` has its parameters in braces. ``body`` is a JSON schema of what is sent as JSON; ``media`` another type,
    for which bytes are made up. ``parameters`` maps a parameter's name to its JSON schema. For a WebSocket ``messages``
    are the texts that are sent.
    """

    path: str
    method: Method = "GET"
    websocket: bool = False
    body: Mapping[str, Any] | None = None
    media: str | None = None
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    messages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ConfigurationError(f"routes: a path begins with a slash, and {self.path!r} does not")
        if not self.path.isprintable() or {"?", "#"} & {*self.path}:
            raise ConfigurationError(
                f"routes: a path is printable and has no query and no fragment, not {self.path!r}; name what stands in "
                "the query in parameters"
            )
        _check_method("routes: method", self.method)
        for name, schema in self.parameters.items():
            if not isinstance(schema, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - it may be a file's
                raise ConfigurationError(f"routes: parameters.{name} of {self.key} must be a JSON schema, a table")

    @property
    def key(self) -> str:
        """ "POST /orders/{item}"; "WS /live" for a WebSocket."""
        return f"WS {self.path}" if self.websocket else f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Cast:
    """Users and given routes. ``public`` are keys of routes, such as "GET /feed", on which everybody may see all.

    Raises ConfigurationError for less than two users, and for two of one name.
    """

    users: tuple[User, ...]
    routes: tuple[Given, ...] = ()
    public: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [user.name for user in self.users]
        if len(names) < 2:
            raise ConfigurationError(f"users: there must be two or more to mix up, not {len(names)}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigurationError(f"users: two are called {min(twice)!r}")
        if len(names) > _MOST_USERS:
            raise ConfigurationError(f"users: there may be {_MOST_USERS} at most, not {len(names)}")
        for one, other in combinations(self.users, 2):
            _check_apart(one, other)

    def __getitem__(self, name: str) -> User:
        return next(user for user in self.users if user.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        """In order."""
        return tuple(user.name for user in self.users)


def _check_method(where: str, method: str) -> None:
    if method not in METHODS:
        raise ConfigurationError(f"{where} must be one of {', '.join(METHODS)}, not {method!r}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_header(user: str, name: str, value: object) -> None:
    """Never says the value: it is a credential."""
    if not _TOKEN.fullmatch(name):
        raise ConfigurationError(f"users: headers of {user}: {name!r} is no header's name")
    if name.lower() in _OURS:
        raise ConfigurationError(f"users: headers of {user}: {name} is made for each request, and cannot be given")
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value != value.strip():
        raise ConfigurationError(
            f"users: headers of {user}: the value of {name} must be a text of printable ASCII characters, without "
            "spaces around it"
        )


def _check_apart(one: User, other: User) -> None:
    """Two users that are one to the application would see each other's all the time."""
    if any(mine in theirs or theirs in mine for mine in one.secrets for theirs in other.secrets):
        raise ConfigurationError(
            f"users: a secret of {one.name} is one of {other.name} too, or part of it, so it is none"
        )
    theirs = {name.lower(): value for name, value in other.headers.items()}
    for name, value in one.headers.items():
        if name.lower() in _CREDENTIALS and theirs.get(name.lower()) == value:
            raise ConfigurationError(f"users: {one.name} and {other.name} have the same {name}, so they are one user")
    for name, value in one.query.items():
        if name.lower() in _QUERY_CREDENTIALS and other.query.get(name) == value:
            raise ConfigurationError(f"users: {one.name} and {other.name} have the same {name}, so they are one user")
    if one.sign_in is not None and one.sign_in == other.sign_in:
        raise ConfigurationError(f"users: {one.name} and {other.name} sign in as the same user")


def strangers(number: int = 3) -> Cast:
    """Users without credentials, for an application that tells its visitors apart by a cookie, or not at all."""
    return Cast(tuple(User(f"visitor-{one}") for one in range(1, number + 1)))
