"""Programs: what is asked of the server, step by step, by code that neither waits nor blocks.

A program is a generator. It yields a step, is sent the replies, and returns the result. ``exchange.py`` runs programs
on asynchronous and on blocking connections, so that everything else is written once.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ucm_valkey.library import Fault

T = TypeVar("T")

Command = tuple[bytes | str | int, ...]


class Commands(tuple[Command, ...]):
    """Commands, with passwords and values that a report of an error with local variables must not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} commands>"


Replies = Sequence[object]
"""What the server answered, in order: bytes, numbers, None, lists, and a Fault for a command that failed."""


@dataclass(frozen=True, slots=True)
class Login:
    """Whom the server is to take a step's commands from."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Step:
    """Commands that are sent at once: one round trip. ``by_admin`` sends them on the admin pool.

    The answer to a step is None when the server refused the login; then nothing was done that the login was for.
    """

    commands: tuple[Command, ...] = field(repr=False)
    login: Login | None = None
    by_admin: bool = False


Program = Generator[Step, Replies | None, T]


def checked(reply: object) -> object:
    """A reply that is no error. Raises CacheUnavailableError for one that is."""
    if isinstance(reply, Fault):
        raise reply.error()
    return reply
