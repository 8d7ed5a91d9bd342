"""What goes over one connection, and which settings are in force there. It reads and writes no socket itself."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ucm_middleware.certify.postgres.framing import Cutter, FramingError, parameters, text_at, without_channel_binding
from ucm_middleware.certify.postgres.question import Question
from ucm_middleware.certify.postgres.statements import Part, name_of, parts_of

_CLIENT: Final = frozenset(b"QPBDECSFcf")
_SERVER: Final = frozenset(b"ZSGWE")
_STARTING: Final = frozenset(b"RSZ")
_ALL: Final = frozenset(range(256))

_ROLES: Final = frozenset({"role", "session_authorization"})
"""What RESET ALL leaves."""

_MOST_NAMES: Final = 100
_MOST_FAILURES: Final = 3

Send = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Use:
    """A client begins to use a connection that was idle, and whose ``settings`` have values by then; ``since`` is when
    it became idle, by the event loop's clock.
    """

    settings: Mapping[str, str] = field(repr=False)
    since: float


class Conversation:
    """Of a client with its server, from the answer to its first message on. ``login`` is the user it asks for.

    When ``is_asking`` the server is asked something, and what the client says is kept until that is answered. When
    ``is_lost`` it could not be followed, and all passes as it comes.
    """

    def __init__(
        self, login: str, to_client: Send, to_server: Send, used: Callable[[Use], None], clock: Callable[[], float]
    ) -> None:
        self.is_lost = False
        self._login = login
        self._to_client = to_client
        self._to_server = to_server
        self._used = used
        self._clock = clock
        self._from_client = Cutter(_CLIENT)
        self._from_server = Cutter(_STARTING)
        self._is_up = False
        self._expected: deque[int] = deque()  # what the server has yet to say "ready" to
        self._is_open = False  # messages were sent that no Sync has followed
        self._is_copying = False
        self._names: dict[str, None] = {}
        self._statements: dict[bytes, tuple[Part, ...]] = {}
        self._question: Question | None = None
        self._held: list[bytes] = []
        self._failures = 0
        self._in_force: dict[str, str] = {}  # what no statement since the connection was idle has changed
        self._since = 0.0

    @property
    def is_asking(self) -> bool:
        return self._question is not None

    def client_says(self, data: bytes) -> None:
        """Bytes came from the client."""
        if self._question is not None:
            self._held.append(data)
            return
        if self.is_lost:
            self._to_server(self._from_client.rest() + data)
            return
        pieces: list[bytes] = []
        try:
            for kind, raw in self._from_client.cut(data):
                pieces.append(raw)
                if kind and not self.is_lost:
                    self._note(kind, raw)
        except FramingError:
            self.is_lost = True
        if self.is_lost:
            pieces.append(self._from_client.rest())
        if said := b"".join(pieces):
            self._to_server(said)

    def server_says(self, data: bytes) -> None:
        """Bytes came from the server."""
        if self.is_lost:
            self._to_client(self._from_server.rest() + data)
            return
        pieces: list[bytes] = []
        was_asking = self._question is not None
        try:
            for kind, raw in self._from_server.cut(data):
                if self._question is not None:
                    if not self._question.takes(kind, raw):
                        pieces.append(raw)
                    if self._question.is_answered:
                        self._hear(self._question)
                else:
                    pieces.append(without_channel_binding(raw) if kind == ord("R") else raw)
                    if kind and not self.is_lost:
                        self._follow(kind, raw)
        except FramingError:
            self.is_lost = True
        if self.is_lost:
            pieces.append(self._from_server.rest())
        if said := b"".join(pieces):
            self._to_client(said)
        if was_asking and self._question is None:
            self._release()

    def server_ends(self) -> None:
        """Nothing comes from the server any more. Why it ends, it may have said in answer to the question."""
        question, self._question = self._question, None
        rest = self._from_server.rest()
        if question is not None:
            rest = question.failure
        if rest:
            self._to_client(rest)

    # The client.

    def _note(self, kind: int, raw: bytes) -> None:
        match chr(kind):
            case "Q":
                self._expect(kind)
                for part in parts_of(text_at(raw, 5)[0]):
                    self._run(part, part.names)
            case "F":
                self._expect(kind)
                self._run(Part(), frozenset())
            case "S" if self._is_copying:  # it is left out
                self._is_open = False
            case "S":
                self._expect(kind)
            case "c" | "f":
                self._is_copying = False
            case _:
                self._is_open = True
                self._prepare(kind, raw)

    def _expect(self, kind: int) -> None:
        """It is answered with "ready". (After messages that failed and were not followed by a Sync it is not: the
        server is taken for busy from then on, and never asked.)
        """
        self._is_open = False
        self._expected.append(kind)

    def _prepare(self, kind: int, raw: bytes) -> None:
        match chr(kind):
            case "P":
                name, at = text_at(raw, 5)
                self._statements[name] = tuple(parts_of(text_at(raw, at)[0]))
            case "B":
                _, at = text_at(raw, 5)
                name, at = text_at(raw, at)
                given = list(parameters(raw, at))
                for part in self._statements.get(name, (Part(),)):
                    found = {name_of(given[one - 1]) for one in part.positions if 0 < one <= len(given)}
                    self._run(part, part.names | {each for each in found if each is not None})
            case "C" if raw[5:6] == b"S":
                self._statements.pop(text_at(raw, 6)[0], None)
            case _:
                pass

    def _run(self, part: Part, names: frozenset[str]) -> None:
        """A statement is about to run, which sets these."""
        self._names.update(dict.fromkeys(names))
        if not self._in_force:
            return
        for name in names | part.resets:
            self._in_force.pop(name, None)
        if part.resets_all:
            self._in_force = {}
        elif "all" in part.resets:
            self._in_force = {name: value for name, value in self._in_force.items() if name in _ROLES}
        if not part.is_preparing and self._in_force:
            use, self._in_force = Use(self._in_force, self._since), {}
            self._used(use)

    # The server.

    def _follow(self, kind: int, raw: bytes) -> None:
        match chr(kind):
            case "Z":
                self._ready(raw[5:6])
            case "S":
                self._hear_parameter(raw)
            case "G":
                # It reads, and leaves out, a Sync that was sent along with the statement.
                self._is_copying = True
                while self._expected and self._expected[0] == ord("S"):
                    self._expected.popleft()
            case "E":
                self._is_copying = False
            case "W":  # a replica's stream
                self.is_lost = True
            case _:
                pass

    def _hear_parameter(self, raw: bytes) -> None:
        name, at = text_at(raw, 5)
        found = name_of(name)
        if self._is_up:
            if found is not None:
                self._names[found] = None
        elif found == "session_authorization":
            self._login = text_at(raw, at)[0].decode(errors="replace")

    def _ready(self, status: bytes) -> None:
        if not self._is_up:
            self._is_up = True
            self._from_server.wanted = _SERVER
            return
        if not self._expected:
            self.is_lost = True
            return
        self._expected.popleft()
        self._is_copying = False
        if not self._expected and not self._is_open and status == b"I":
            self._ask()

    def _ask(self) -> None:
        self._in_force, self._since = {}, self._clock()
        if len(self._names) > _MOST_NAMES:
            self.is_lost = True
        elif self._names:
            self._question = Question(self._names)
            self._from_server.wanted = _ALL
            self._to_server(self._question.to_bytes())

    def _hear(self, question: Question) -> None:
        self._question = None
        self._from_server.wanted = _SERVER
        if question.values is None:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                self.is_lost = True
            return
        self._failures = 0
        usual = {"role": "none", "session_authorization": self._login}
        self._in_force = {name: value for name, value in question.values.items() if value != usual.get(name, "")}

    def _release(self) -> None:
        held, self._held = self._held, []
        if held:
            self.client_says(b"".join(held))
