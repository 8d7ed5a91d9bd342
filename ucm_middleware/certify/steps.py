"""What a run is made of: the steps that its users take, one after another, as data that can be taken again."""

from dataclasses import dataclass
from typing import Final, Literal

Manner = Literal["whole", "half sent", "not waited for", "cut off", "slow"]
"""How a request is made: as clients mean to; dropped in the middle of its body; dropped once it is sent; dropped in the
middle of the answer; or its answer is left standing, and read when everything else of the step is over.
"""

Word = Literal["shared", "own"]
"""What free text stands for: a word that all users use, or a canary of whoever sends it."""

BIG: Final = 4 * 1024 * 1024
"""Bytes that a padded body has more: enough for a server to stop reading in the middle."""

Drive = Literal[
    "tour",
    "keep-alive",
    "pipelining",
    "HTTP/2",
    "burst",
    "dropped",
    "slow reader",
    "background",
    "websocket",
    "others' ids",
    "sign out and in",
    "restart",
]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. ``case`` is which of the route's prepared ones, ``line`` the connection: with a user's name, or one
    that several share as behind a proxy. ``ids_of`` is whose ids stand in the path. A ``patient`` one is repeated for
    a while when it is answered with 404 or 202.
    """

    number: int
    user: str
    route: str
    case: int
    line: str
    word: Word = "shared"
    manner: Manner = "whole"
    padding: int = 0
    ids_of: str | None = None
    patient: bool = False

    def __str__(self) -> str:
        extras = [f"on the connection {self.line!r}"]
        if self.manner != "whole":
            extras.append(self.manner)
        if self.padding:
            extras.append(f"with {self.padding // (1024 * 1024)} MiB of padding")
        if self.word == "own":
            extras.append("with a canary in it")
        if self.ids_of not in (None, self.user):
            extras.append(f"with an id of {self.ids_of}")
        if self.patient:
            extras.append("until it is there")
        return f"{self.user}: {self.route} ({', '.join(extras)})"


@dataclass(frozen=True, slots=True)
class Together:
    """Requests at the same time. Those on one line are pipelined, or multiplexed where the line speaks HTTP/2."""

    asks: tuple[Ask, ...]
    http2: bool = False

    def __str__(self) -> str:
        how = "multiplexed on one HTTP/2 connection" if self.http2 else "at the same time"
        return f"{how}: {'; '.join(map(str, self.asks))}"


@dataclass(frozen=True, slots=True)
class Connect:
    """A user opens a WebSocket, named ``socket``."""

    number: int
    user: str
    route: str
    case: int
    socket: str
    word: Word = "shared"

    def __str__(self) -> str:
        return f"{self.user}: opens {self.route}"


@dataclass(frozen=True, slots=True)
class Say:
    """A user sends a text over one of their WebSockets."""

    number: int
    user: str
    route: str
    socket: str
    message: int
    word: Word = "own"

    def __str__(self) -> str:
        return f"{self.user}: sends over {self.route}"


@dataclass(frozen=True, slots=True)
class HangUp:
    """A user's WebSocket is closed, or with ``abruptly`` its connection is dropped."""

    user: str
    socket: str
    abruptly: bool = False

    def __str__(self) -> str:
        return f"{self.user}: {'drops' if self.abruptly else 'closes'} the WebSocket"


@dataclass(frozen=True, slots=True)
class SignOut:
    """A user signs out, and takes no part until they sign in."""

    number: int
    user: str
    route: str
    line: str

    def __str__(self) -> str:
        return f"{self.user}: signs out by {self.route} (on the connection {self.line!r})"


@dataclass(frozen=True, slots=True)
class SignIn:
    """A user signs in. Who does anything else first in a row of steps has signed in before them."""

    number: int
    user: str
    route: str
    line: str

    def __str__(self) -> str:
        return f"{self.user}: signs in by {self.route} (on the connection {self.line!r})"


@dataclass(frozen=True, slots=True)
class Restart:
    """The server is told to end, and started again; whoever signs in does it anew."""

    sign_ins: tuple[SignIn, ...] = ()

    def __str__(self) -> str:
        return "the server is restarted"


Step = Ask | Together | Connect | Say | HangUp | SignOut | SignIn | Restart


Asked = Ask | SignIn | SignOut | Connect


def requests_of(step: Step) -> tuple[Asked, ...]:
    """All that is answered in a step."""
    match step:
        case SignIn() | SignOut() | Connect():
            return (step,)
        case Restart():
            return step.sign_ins
        case _:
            return asks_of(step)


def asks_of(step: Step) -> tuple[Ask, ...]:
    """The requests in a step."""
    match step:
        case Ask():
            return (step,)
        case Together():
            return step.asks
        case _:
            return ()
