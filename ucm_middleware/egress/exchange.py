"""What one user's client sent in a request or on a connection: who sent a value knows it already."""

from typing import Any, Final

from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import LETTERS, LONGEST, as_bytes, given_runs
from ucm_middleware.types import Scope

MOST_RUNS: Final = 4096
"""How many runs of letters and digits are remembered of one request; of one connection the newest."""

MOST_KNOWN: Final = 65_536
"""How many times it is remembered that a user sent a value of somebody else's."""

_ENCODED: Final = LETTERS + b"-_%\\"


class Known:
    """Which users have sent which values of others, while those were protected: the newest of it."""

    __slots__ = ("_pairs",)

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, int], None] = {}

    def add(self, user_id: str, key: int) -> None:
        self._pairs[user_id, key] = None
        forget_oldest(self._pairs, MOST_KNOWN)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._pairs


class Exchange:
    """A request or a connection. What comes is taken in at once: what the app shows of it in another answer, even
    before this one is through, must be known by then.

    It does not hold the context, which holds it.
    """

    __slots__ = ("_head", "_known", "_rest", "_sent", "_table", "scope")

    def __init__(self, user_id: str, scope: Scope, table: ProtectedValues, known: Known) -> None:
        self._table = table
        self._known = known
        self._sent: dict[int, None] = {}
        self._rest = b""
        self.scope: Scope | None = scope
        head: list[Any] = [scope.get("raw_path") or as_bytes(scope.get("path", "")), scope.get("query_string", b"")]
        for pair in scope.get("headers", ()):
            head += pair
        # Only whether it has a value in it is asked at once; what it has, when something is found that goes out.
        self._head: bytes | None = b" ".join(head)
        if b"%" in self._head or b"\\" in self._head or table.may_hold(self._head):
            self._take(self._head, user_id)
            self._head = None

    def came(self, data: object, user_id: str, *, goes_on: bool = False) -> None:
        """What the client of this user sent: a message, or a part of a body, which may go on."""
        text = self._rest + as_bytes(data)
        self._rest = text[len(text.rstrip(_ENCODED)) :][-LONGEST:] if goes_on else b""
        self._take(text, user_id)

    def _take(self, text: bytes, user_id: str) -> None:
        keys = dict.fromkeys(map(hash, given_runs(text)))
        self._sent.update(keys)
        forget_oldest(self._sent, MOST_RUNS)
        self._remember(keys, user_id)

    def is_of(self, user_id: str) -> None:
        """The client turned out to be this user's: what it sent the user knows from now on."""
        if self._head is not None:
            self._take(self._head, user_id)
        self._remember(self._sent.copy(), user_id)

    def has_sent(self, key: int) -> bool:
        """Whether this value came in this exchange."""
        if key in self._sent:
            return True
        return self._head is not None and key in map(hash, given_runs(self._head))

    def end(self) -> None:
        """It is over: let go of what has the context in it."""
        self.scope = None

    def _remember(self, keys: dict[int, None], user_id: str) -> None:
        for key in self._table.keys_among(keys):
            if user_id not in self._table.owners_of(key):
                self._known.add(user_id, key)


def forget_oldest(kept: dict[Any, Any], most: int) -> None:
    """Have at most so many. Takes no lock: where another thread comes in between, it is tried again."""
    while len(kept) > most:
        try:
            kept.pop(next(iter(kept)), None)
        except RuntimeError:  # it has just changed
            continue
