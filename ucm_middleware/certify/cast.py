"""Who takes part in a run: users with what they call with and what only they may see, and the routes that are given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ucm_middleware.errors import ConfigurationError

SHORTEST_SECRET: Final = 8
"""Characters. What is shorter may stand in an answer by chance."""

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
METHODS: Final[tuple[Method, ...]] = ("GET", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, slots=True)
class Call:
    """A request by which a user signs in or out. ``body`` is sent as JSON, ``form`` as a form's fields.

    ``token`` names the field of the JSON answer that is sent as a bearer token from then on; cookies are kept without.
    """

    path: str
    method: Method = "POST"
    body: Any = field(default=None, repr=False)
    form: Mapping[str, str] | None = field(default=None, repr=False)
    token: str | None = None


@dataclass(frozen=True, slots=True)
class User:
    """A user of the application that is tried. ``headers`` go with each request, credentials for example.

    ``secrets`` are canaries that the application has already: texts that this user may see, and no other one.

    Raises ConfigurationError for a secret of less than eight characters.
    """

    name: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    sign_in: Call | None = None
    sign_out: Call | None = None

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name:
            raise ConfigurationError(f"users: a name must be printable and not empty, not {self.name!r}")
        if any(len(secret) < SHORTEST_SECRET for secret in self.secrets):
            raise ConfigurationError(
                f"users: {self.name} has a secret of less than {SHORTEST_SECRET} characters, which may stand in an "
                "answer by chance; give a longer one"
            )


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
        if self.method not in METHODS:
            raise ConfigurationError(f"routes: method must be one of {', '.join(METHODS)}, not {self.method!r}")

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
        if shared := _shared(self.users):
            raise ConfigurationError(f"users: {' and '.join(shared)} have the same secret, so it is none")

    def __getitem__(self, name: str) -> User:
        return next(user for user in self.users if user.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        """In order."""
        return tuple(user.name for user in self.users)


def _shared(users: tuple[User, ...]) -> tuple[str, ...]:
    owners: dict[str, str] = {}
    for user in users:
        for secret in user.secrets:
            if (other := owners.setdefault(secret, user.name)) != user.name:
                return other, user.name
    return ()


def strangers(number: int = 3) -> Cast:
    """Users without credentials, for an application that tells its visitors apart by a cookie, or not at all."""
    return Cast(tuple(User(f"visitor-{one}") for one in range(1, number + 1)))
