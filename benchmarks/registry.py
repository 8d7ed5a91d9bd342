"""The table of live contexts against a plain dict, and the manager's own calls, as live contexts grow in number."""

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from time import monotonic, thread_time_ns
from typing import Any, Final

from benchmarks.report import finish, parser, show
from benchmarks.timing import Cell, percentile, ratio, take_turns
from ucm_middleware import UserContextManager, UserExecutionContext, create_isolated_execution_context
from ucm_middleware.registry import Key, Limits, Registry

PUT_RATIO: Final = 1.25
"""Putting an entry in and taking it out, against the dict."""
GET_RATIO: Final = 1.2
"""Finding an entry, against the dict."""
GROWTH: Final = 2.0
"""The manager's calls at the largest number of live contexts, in those at the smallest."""
LATENCY_US: Final = 1000.0
"""The 99.9th percentile of the manager's calls, in microseconds, with the garbage collector on."""

SIZES: Final = (1_000, 100_000, 1_000_000)
TTL: Final = 3600.0
CHURN: Final = 5_000
"""How many different entries come and go, or are asked for."""

_numbers = count()


class Entry:
    """What the plain dict holds."""

    __slots__ = ("deadline", "value")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.value = None


class Plain:
    """A dict without expiry, owners, limits or a lock: what the table is measured against."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.entries = {key: Entry(monotonic() + TTL) for key in keys}

    def put(self, key: Key) -> None:
        self.entries[key] = Entry(monotonic() + TTL)

    def delete(self, key: Key) -> None:
        self.entries.pop(key, None)

    def get(self, key: Key) -> Entry | None:
        return self.entries.get(key)


@dataclass(frozen=True, slots=True)
class TableFigures:
    """Nanoseconds of the table, and its ratios to the dict."""

    put_ns: float
    put_ratio: float
    get_ns: float
    get_ratio: float


@dataclass(frozen=True, slots=True)
class ManagerFigures:
    """Microseconds of the manager's calls: the median, and the 99.9th percentile."""

    get_us: float
    get_worst_us: float
    set_us: float
    set_worst_us: float


Tables = dict[tuple[int, str], TableFigures]
"""By the number of live contexts and the kind of key."""


def new_contexts(number: int) -> list[UserExecutionContext]:
    """Contexts under no manager, each of another user."""
    return [create_isolated_execution_context(f"user-{next(_numbers):09}") for _ in range(number)]


def _passes(items: Sequence[Any], body: Callable[[Sequence[Any]], None]) -> Cell:
    """A cell that runs the body over the items again and again."""

    def cell(operations: int) -> int:
        start = thread_time_ns()
        while operations > 0:
            body(items[:operations])
            operations -= len(items)
        return thread_time_ns() - start

    return cell


def _user(context: UserExecutionContext) -> Key:
    return context.user_id


def _pair(context: UserExecutionContext) -> Key:
    return context.user_id, context.request_id


KEYS: Final[dict[str, Callable[[UserExecutionContext], Key]]] = {"user id": _user, "pair": _pair}
"""Under what a context stands: ``set_context`` by its user's id, the middleware by the pair."""


def measure_table(
    contexts: Sequence[UserExecutionContext],
    visitors: Sequence[UserExecutionContext],
    key_of: Callable[[UserExecutionContext], Key],
    rounds: int,
) -> TableFigures:
    """The table with these contexts in it, while the visitors come and go. The dict has the same keys."""
    plain = Plain([key_of(context) for context in contexts])
    unlimited = 2 * len(contexts) + len(visitors)
    table = Registry(Limits(10, unlimited, unlimited, 10), monotonic)
    by_pair = isinstance(key_of(contexts[0]), tuple)

    def put_in(context: UserExecutionContext, key: Key) -> None:
        context.lifetime.deadline = None  # as new as a request's: one with a deadline takes the long way
        if by_pair:
            table.admit(context, TTL)  # as each request does
        else:
            table.insert(context, key, TTL)

    for context in contexts:
        put_in(context, key_of(context))
    asked = [_afresh(key_of(context)) for context in random.Random(3).choices(contexts, k=CHURN)]
    arrivals = [(context, key_of(context)) for context in visitors]

    def churn_plain(keys: Sequence[Key]) -> None:
        put, delete = plain.put, plain.delete
        for key in keys:
            put(key)
            delete(key)

    def churn_table(items: Sequence[tuple[UserExecutionContext, Key]]) -> None:
        remove = table.remove
        if by_pair:
            admit = table.admit
            for context, _ in items:
                context.lifetime.deadline = None
                admit(context, TTL)
                remove(context)
            return
        insert = table.insert
        for context, key in items:
            context.lifetime.deadline = None
            insert(context, key, TTL)
            remove(context)

    def get_plain(keys: Sequence[Key]) -> None:
        get = plain.get
        for key in keys:
            get(key)

    def get_table(keys: Sequence[Key]) -> None:
        lookup = table.lookup
        for key in keys:
            lookup(key)

    put = take_turns(
        {"dict": _passes([key for _, key in arrivals], churn_plain), "table": _passes(arrivals, churn_table)}, rounds
    )
    get = take_turns({"dict": _passes(asked, get_plain), "table": _passes(asked, get_table)}, rounds)
    return TableFigures(
        statistics.median(put["table"]),
        ratio(put, "table", "dict"),
        statistics.median(get["table"]),
        ratio(get, "table", "dict"),
    )


def _afresh(key: Key) -> Key:
    """An equal key of new texts, as they come out of a request."""
    return "".join(list(key)) if isinstance(key, str) else ("".join(list(key[0])), "".join(list(key[1])))


def measure_manager(size: int, calls: int) -> ManagerFigures:
    """The manager's calls, each timed by itself, with so many contexts live."""
    manager = UserContextManager(max_contexts=2 * size + calls, ttl=TTL)
    gc.disable()
    users: list[str] = []
    for context in new_contexts(size):
        manager.set_context(context.user_id, context)
        users.append(context.user_id)
    gc.enable()
    gc.collect()
    asked = random.Random(3).choices(users, k=calls)
    get: list[float] = []
    set_: list[float] = []
    for user in asked:
        start = thread_time_ns()
        manager.get_context(user)
        get.append((thread_time_ns() - start) / 1e3)
    for context in new_contexts(calls):
        user = context.user_id
        start = thread_time_ns()
        manager.set_context(user, context)
        manager.clear_context(user)
        set_.append((thread_time_ns() - start) / 1e3)
    return ManagerFigures(
        statistics.median(get), percentile(get, 99.9), statistics.median(set_), percentile(set_, 99.9)
    )


def missed_limits(tables: Tables, managers: dict[int, ManagerFigures]) -> list[str]:
    """Which limits are missed, in words."""
    held: list[tuple[str, float, float, str]] = []
    for (size, kind), table in tables.items():
        held.append((f"put and delete by {kind} at {size:,}", table.put_ratio, PUT_RATIO, "x a dict"))
        held.append((f"get by {kind} at {size:,}", table.get_ratio, GET_RATIO, "x a dict"))
    for size, manager in managers.items():
        held.append((f"p99.9 of get_context at {size:,}", manager.get_worst_us, LATENCY_US, " us"))
        held.append((f"p99.9 of set_context and clear_context at {size:,}", manager.set_worst_us, LATENCY_US, " us"))
    few, many = managers[min(managers)], managers[max(managers)]
    held.append(("growth of get_context", many.get_us / few.get_us, GROWTH, "x"))
    held.append(("growth of set_context and clear_context", many.set_us / few.set_us, GROWTH, "x"))
    return [f"{what}: {found:.2f}{unit}, at most {limit:g}" for what, found, limit, unit in held if found > limit]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of live contexts")
    options_parser.add_argument("--rounds", type=int, default=9)
    options_parser.add_argument("--calls", type=int, default=20_000, help="timed calls of the manager, per size")
    options = options_parser.parse_args()
    gc.disable()
    contexts, visitors = new_contexts(max(options.sizes)), new_contexts(CHURN)
    gc.enable()
    tables = {
        (size, kind): measure_table(contexts[:size], visitors, key_of, options.rounds)
        for size in options.sizes
        for kind, key_of in KEYS.items()
    }
    del contexts
    managers = {size: measure_manager(size, options.calls) for size in options.sizes}
    show(
        "The table of live contexts against a plain dict",
        ["live, by key", "put and delete, ns", "x dict", "get, ns", "x dict"],
        [
            [
                f"{size:,}, {kind}",
                f"{own.put_ns:.0f}",
                f"{own.put_ratio:.2f}",
                f"{own.get_ns:.0f}",
                f"{own.get_ratio:.2f}",
            ]
            for (size, kind), own in tables.items()
        ],
    )
    show(
        "The manager's calls, microseconds of CPU",
        ["live", "get_context", "p99.9", "set_context and clear_context", "p99.9"],
        [
            [f"{size:,}", *(f"{value:.2f}" for value in (own.get_us, own.get_worst_us, own.set_us, own.set_worst_us))]
            for size, own in managers.items()
        ],
    )
    figures = {
        "table": {f"{size} by {kind}": asdict(own) for (size, kind), own in tables.items()},
        "manager": {str(size): asdict(own) for size, own in managers.items()},
    }
    finish(options, figures, missed_limits(tables, managers))


if __name__ == "__main__":
    main()
