"""What the runner and the witness say to each other, over a Unix socket: a line of JSON each."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

SOCKET: Final = "UCM_CERTIFY_SOCKET"
"""The environment variable that says where the runner listens. What is secret goes over the socket, not into it."""

NUMBER: Final = "x-ucm-certify"
"""The header that says which request it is."""

USER: Final = "x-ucm-certify-user"
"""The header that says who is asking, by their place in the order; it is left out while they are signed out."""

Kind = Literal["routes", "log", "span", "unavailable"]


@dataclass(frozen=True, slots=True)
class Order:
    """What the witness is told first: the application, what canaries look like, and with ``users``, which has their
    names, to add the package.
    """

    app: str
    factory: bool
    patterns: tuple[str, ...] = field(repr=False)
    users: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Lists for tuples."""
        return {"app": self.app, "factory": self.factory, "patterns": self.patterns, "users": self.users}

    @classmethod
    def of_json(cls, table: dict[str, Any]) -> "Order":
        """The inverse."""
        users = table["users"]
        return cls(table["app"], table["factory"], tuple(table["patterns"]), None if users is None else tuple(users))


@dataclass(frozen=True, slots=True)
class Told:
    """What the witness tells. ``number`` is the request it belongs to; ``text`` what a log record or a span says."""

    kind: Kind
    number: int | None = None
    text: str = field(default="", repr=False)
    where: str = ""
    routes: tuple[tuple[str, tuple[str, ...], bool], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Lists for tuples."""
        return {
            "kind": self.kind,
            "number": self.number,
            "text": self.text,
            "where": self.where,
            "routes": self.routes,
        }

    @classmethod
    def of_json(cls, table: dict[str, Any]) -> "Told":
        """The inverse."""
        routes = tuple((path, tuple(methods), is_socket) for path, methods, is_socket in table["routes"])
        return cls(table["kind"], table["number"], table["text"], table["where"], routes)
