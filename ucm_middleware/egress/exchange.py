"""What one user's client sent in a request or on a connection: who sent a value knows it already."""

from collections import deque
from typing import Any, Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import cut, given_runs

MOST_RUNS: Final = 4096
"""How many runs of letters and digits are remembered of one request; of one connection the newest."""

MOST_KNOWN: Final = 65_536
"""How many times it is remembered that a user sent a value of somebody else's."""

SLICE: Final = 65_536
"""Bytes that wait to be looked at."""


class Known:
    """Which users have sent which values of others, while those were protected: the newest of it."""

    __slots__ = ("_pairs",)

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, int], None] = {}

    def add(self, user_id: str, key: int) -> None:
        self._pairs[user_id, key] = None
        while len(self._pairs) > MOST_KNOWN:
            self._pairs.pop(next(iter(self._pairs)), None)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._pairs


class Exchange:
    """A request or a connection. What came is looked at when something goes out: most of it never needs to be."""

    __slots__ = ("_context", "_known", "_order", "_rest", "_sent", "_table", "_waiting", "_waiting_size", "scope")

    def __init__(
        self, context: UserExecutionContext, scope: dict[str, Any], table: ProtectedValues, known: Known
    ) -> None:
        self._context = context
        self._table = table
        self._known = known
        self._sent: set[int] = set()
        self._order: deque[int] = deque()
        self._rest = b""
        self.scope = scope
        head = [scope.get("raw_path") or b"", str(scope.get("path", "")).encode(), scope.get("query_string", b"")]
        head += [value for _, value in scope.get("headers", ())]
        self._waiting: list[bytes] = [b" ".join(head) + b" "]
        self._waiting_size = 0

    def came(self, data: str | bytes | None) -> None:
        """A part of what the client sends: of a body, which goes on."""
        if data:
            part = data.encode(errors="replace") if isinstance(data, str) else bytes(data)
            self._waiting.append(part)
            self._waiting_size += len(part)
            if self._waiting_size > SLICE:
                self.settle()

    def has_sent(self, key: int) -> bool:
        """Whether this value came in this exchange, or from this user before."""
        return key in self._sent or (self._context.user_id, key) in self._known

    def settle(self) -> None:
        """Take in what came until now."""
        if not self._waiting:
            return
        data = self._rest + b"".join(self._waiting)
        self._waiting, self._waiting_size = [], 0
        self._rest = cut(data)[1]
        keys = set(map(hash, given_runs(data)))
        user_id = self._context.user_id
        for key in self._table.keys_among(keys):
            if user_id not in self._table.owners_of(key):
                self._known.add(user_id, key)
        for key in keys - self._sent:
            self._sent.add(key)
            self._order.append(key)
        while len(self._order) > MOST_RUNS:
            self._sent.discard(self._order.popleft())
