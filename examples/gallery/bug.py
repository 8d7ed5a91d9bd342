"""What the gallery says of each of its bugs, and the steps of a drive that shows it. No application imports more."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of a user's. ``body`` is sent as JSON, ``padding`` adds that many bytes to it.

    A ``patient`` one is repeated while it is answered with 404. ``line`` names a connection that requests of several
    users go over, one after another, as behind a reverse proxy; without it each user has a connection of their own.
    """

    user: str
    method: Literal["GET", "POST"]
    path: str
    body: dict[str, str] | None = None
    padding: int = 0
    patient: bool = False
    line: str | None = None


@dataclass(frozen=True, slots=True)
class Connect:
    """A user opens a WebSocket, which stays open to the end of the drive, and reads the one message it begins with."""

    user: str
    path: str


@dataclass(frozen=True, slots=True)
class Say:
    """A user sends a text over their WebSocket, and reads what came, up to the message that has this text in it."""

    user: str
    text: str


Step = Ask | Connect | Say


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug of the gallery. ``wrong`` is what goes wrong, ``shown_by`` how the drive shows it, one sentence each.

    ``module`` has ``create_app(*, planted, manager=None)``, and ``planted()`` and ``clean()`` for servers. After the
    ``drive`` the planted app has sent ``victim``'s key to ``receiver``; ``cured`` says that it does not with the
    middleware. ``needs`` is a service that must run, named by its variable in the environment.
    """

    name: str
    title: str
    wrong: str
    shown_by: str
    drive: tuple[Step, ...]
    cured: bool = False
    needs: Literal["GALLERY_POSTGRES"] | None = None
    victim: str = "alice"
    receiver: str = "bob"

    @property
    def module(self) -> str:
        """Where the app is: a module of this package."""
        return f"examples.gallery.{self.name}"
