"""Ids: the rules for those that come from outside, and the making and reading of the product's own."""

import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from os import getpid, urandom
from typing import Final, Literal, TypeGuard, cast

from ucm_middleware.environment import ENVIRONMENT_VARIABLE, Environment, process_environment
from ucm_middleware.errors import InvalidContextError

MAX_LENGTH: Final = 256
"""The most characters (code points) an id may have."""

SHORT_LENGTH: Final = 20
"""Ids below this many characters are checked for placeholders; a longer one was generated, not typed."""

RESERVED_PREFIX: Final = "anonymous_"
"""Begins the ids of anonymous contexts, which only the product makes: taking one from outside could name a stranger."""

PLACEHOLDERS: Final = frozenset(
    {
        # what a programming language writes where a value is missing
        "none", "null", "undefined", "[object object]",
        # what people and tools write until they know better
        "placeholder", "default", "unknown", "anonymous", "example", "template", "test", "temp", "tmp", "dummy",
        "string", "changeme", "xxx", "tbd", "n/a",
    }
)  # fmt: skip
"""Whole ids that mean "nobody filled this in", in any case. Left out on purpose, because people are called so: Nil,
Nan, Todo, Na, Guest, Sample, Mock, Fake; and ``0``, ``1``, ``admin``, ``demo``, which are real accounts."""

PLACEHOLDER_PREFIXES: Final = frozenset(
    {"placeholder", "temp", "tmp", "mock", "fake", "dummy", "default", "example", "sample", "template"}
    | {"none", "null", "undefined"}
)
"""What may not stand before the first underscore of a short id, in any case. So may not ``test``, outside a testing
environment."""

_FILL_IN: Final = "give the real id; whatever made this one left it unfilled"

# Characters that print as nothing although Unicode counts them as letters, marks or symbols: the Default_Ignorable ones
# of DerivedCoreProperties.txt which str.isprintable() lets through, and the blanks and fillers among the rest.
_INVISIBLE: Final = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc"
    "\U00013441\U00013442\U00016fe4\U0001d159"
).union(map(chr, range(0xFE00, 0xFE10)), map(chr, range(0xE0100, 0xE01F0)))

_BIDIRECTIONAL: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# Most ids: visible ASCII without an underscore, and with a digit, which no placeholder has. For the others, the rules.
_PLAIN_ID: Final = re.compile(r"[!-/:-^`-~]*[0-9][!-^`-~]*")


def validate_id(value: object, field: str) -> str:
    """Return ``value`` as an exact ``str`` when it may serve as an id; it is never altered.

    ``field`` is the name an error gives it. Raises ``InvalidContextError``, which names the rule and not the value, for
    what is not text, is empty, blank or over 256 characters, has blanks around it, has control, bidirectional or other
    invisible characters in it (any blank but U+0020 is one), is a placeholder, or begins as one of ours does.
    ``test_...`` under 20 characters is accepted where ``UCM_ENVIRONMENT`` of the process is ``testing``.
    """
    text = value if type(value) is str else _exact_text(value, field)
    if len(text) <= MAX_LENGTH and _PLAIN_ID.fullmatch(text):
        return text
    # isprintable() is false for exactly the categories C* and Z*, U+0020 excepted.
    if not 0 < len(text) <= MAX_LENGTH or not text.isprintable() or text[0] == " " or text[-1] == " ":
        raise _shape_error(text, field)
    if not text.isascii() and not _INVISIBLE.isdisjoint(text):
        raise _shape_error(text, field)
    if len(text) < SHORT_LENGTH:
        _check_placeholder(text.casefold(), field)
    if text[9:10] == "_" and text[:10].casefold() == RESERVED_PREFIX:
        raise InvalidContextError(
            field, f"begins with {RESERVED_PREFIX}, which is reserved", "use another id: these are only made, not given"
        )
    return text


def _exact_text(value: object, field: str) -> str:
    # The slot of str itself calls nothing that a subclass defines, and refuses what only claims to be a str (a mock).
    try:
        return str.__str__(cast(str, value))
    except TypeError:
        raise InvalidContextError(
            field, f"is not text but {type(value).__name__}", "give a str, such as str(user.id)", is_wrong_type=True
        ) from None


def _check_placeholder(folded: str, field: str) -> None:
    if folded in PLACEHOLDERS:
        raise InvalidContextError(field, "is a placeholder", _FILL_IN)
    if "_" not in folded:
        return
    prefix = folded[: folded.index("_")]
    if prefix in PLACEHOLDER_PREFIXES:
        rule = f"begins with the placeholder {prefix}_ and has fewer than {SHORT_LENGTH} characters"
        raise InvalidContextError(field, rule, _FILL_IN)
    if prefix == "test" and process_environment() is not Environment.TESTING:
        raise InvalidContextError(
            field,
            f"begins with test_ and has fewer than {SHORT_LENGTH} characters outside a testing environment",
            f"give the real id, or start the process of a test with {ENVIRONMENT_VARIABLE}={Environment.TESTING}",
        )


def _shape_error(text: str, field: str) -> InvalidContextError:
    if len(text) > MAX_LENGTH:
        return InvalidContextError(field, f"has more than {MAX_LENGTH} characters", "use a shorter id")
    if not text.strip():
        return InvalidContextError(field, "is blank" if text else "is empty", "give the id")
    for index, character in enumerate(text):
        if not character.isprintable() or character in _INVISIBLE:
            if unicodedata.category(character) == "Cc":
                rule = "has a control character in it"
            elif character in _BIDIRECTIONAL:
                rule = "has a bidirectional control in it"
            else:
                rule = "has an invisible or unassigned character in it"
            return InvalidContextError(field, rule, f"remove U+{ord(character):04X} at index {index}")
    return InvalidContextError(field, "has blanks around it", "remove them")


Core = int
"""What an id is made from, 128 bits: nanoseconds since 1970 above 64 random ones. Most are never read as text."""

IDKind = Literal["thread", "run", "request", "websocket", "anonymous"]

_OWN_ID: Final = re.compile(r"(?:(thread|request|websocket|anonymous)|run_(.+))_([0-9a-f]{32})")
CORE_LENGTH: Final = 32
_RUN_OVERHEAD: Final = len("run__") + CORE_LENGTH
_POOL_CHUNKS: Final = 128
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ParsedID:
    """What an id of ours says. ``core`` is 32 hex digits; ``created_at`` is aware, in UTC, None for anonymous ids;
    ``thread_id`` is the thread of a run, None for other kinds."""

    kind: IDKind
    core: str
    created_at: datetime | None
    thread_id: str | None


class _Source:
    """What cores are made from within one process: the last time given out, and random chunks cut in advance."""

    __slots__ = ("chunks", "last_ns")

    def __init__(self) -> None:
        self.chunks: list[int] = []
        self.last_ns = 0

    def refill(self) -> int:
        fresh = memoryview(urandom(8 * _POOL_CHUNKS)).cast("Q").tolist()
        chunk = fresh.pop()
        self.chunks.extend(fresh)
        return chunk


def core_text(core: Core) -> str:
    """A core as it stands in ids: 32 hex digits."""
    return f"{core:032x}"


def is_own_request_id(request_id: str) -> bool:
    """Whether this has the shape of a request id that was made here."""
    return len(request_id) == len("request_") + CORE_LENGTH and request_id.startswith("request_")


def thread_id_of(request_id: str) -> str:
    """The thread of a request that was given none: made from the core of its id."""
    return f"thread_{request_id[-CORE_LENGTH:]}"


def run_id_of(request_id: str) -> str:
    """The run of a request that was given none, in the thread that was made for it."""
    core = request_id[-CORE_LENGTH:]
    return f"run_thread_{core}_{core}"


class UnifiedIDManager:
    """Makes and reads the product's ids: ``thread_``, ``request_`` and ``websocket_`` with a core,
    ``run_<thread>_<core>``, and ``anonymous_`` with 128 random bits.

    A core is 16 hex digits of nanoseconds since 1970 and 16 random ones. The cores of one manager in one process ascend
    strictly as text in the order they are made, across threads, also while the clock stands still or goes back: the
    time in them then runs ahead of the clock, a nanosecond an id. So ids of a kind sort by age, and runs do within
    their thread. Between processes they sort as well as the clocks agree, and the random half tells ids of one instant
    apart. ``clock_ns`` takes the place of ``time.time_ns``.
    """

    __slots__ = ("_clock_ns", "_sources")

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        self._sources: dict[int, _Source] = {}  # by process id

    def generate_core(self) -> Core:
        """A new core, for callers that build several ids of one request from it, or none until one is read."""
        now = self._clock_ns()
        pid = getpid()
        try:
            source = self._sources[pid]
        except KeyError:
            source = self._enter_process(pid)
        # No lock: these three lines call nothing, and under the GIL threads and signal handlers come in between calls.
        if now <= source.last_ns:
            now = source.last_ns + 1
        source.last_ns = now
        try:
            chunk = source.chunks.pop()
        except IndexError:
            chunk = source.refill()
        return now << 64 | chunk

    def _enter_process(self, pid: int) -> _Source:
        # After a fork the parent goes on with the chunks that were copied here, and a thread that does not exist here
        # may hold the copied lock: neither can be used. setdefault gives threads that come here together one source.
        source = self._sources.setdefault(pid, _Source())
        for other in self._sources.keys() - {pid}:
            self._sources.pop(other, None)
        return source

    def generate_thread_id(self) -> str:
        """The id of a new thread."""
        return f"thread_{core_text(self.generate_core())}"

    def generate_request_id(self) -> str:
        """The id of a new request."""
        return f"request_{core_text(self.generate_core())}"

    def generate_websocket_client_id(self) -> str:
        """The id of a new WebSocket connection."""
        return f"websocket_{core_text(self.generate_core())}"

    def generate_run_id(self, thread_id: str | None = None) -> str:
        """A run in ``thread_id``, any valid id of at most 219 characters, or in a new thread made from the same core.

        Raises ``InvalidContextError`` for another thread id.
        """
        core = core_text(self.generate_core())
        thread = f"thread_{core}" if thread_id is None else validate_id(thread_id, "thread_id")
        if len(thread) + _RUN_OVERHEAD > MAX_LENGTH:
            raise InvalidContextError(
                "thread_id",
                f"makes a run id of more than {MAX_LENGTH} characters",
                f"use a thread id of at most {MAX_LENGTH - _RUN_OVERHEAD} characters",
            )
        return f"run_{thread}_{core}"

    def generate_anonymous_id(self) -> str:
        """The id of an anonymous context: unguessable, and not from the pool, so that no fork can ever repeat one."""
        return f"{RESERVED_PREFIX}{urandom(16).hex()}"

    def parse(self, value: object) -> ParsedID:
        """Take an id of ours apart. Raises ``InvalidContextError`` for anything that this class does not make.

        A run's thread may hold any text, so the core is the fixed-width end; the thread must itself be a valid id.
        """
        text = value if type(value) is str else _exact_text(value, "id")
        match = _OWN_ID.fullmatch(text) if len(text) <= MAX_LENGTH else None
        if match is None:
            raise InvalidContextError("id", "is not one that UnifiedIDManager makes", "give a generated id, unaltered")
        thread = match[2]
        kind = cast(IDKind, match[1] or "run")
        created = None if kind == "anonymous" else _EPOCH + timedelta(microseconds=int(match[3][:16], 16) // 1000)
        return ParsedID(kind, match[3], created, None if thread is None else validate_id(thread, "thread_id"))

    def validate(self, value: object, kind: IDKind | None = None) -> bool:
        """Whether ``parse`` accepts the value and, when a kind is given, finds that kind."""
        try:
            parsed = self.parse(value)
        except InvalidContextError:
            return False
        return kind is None or parsed.kind == kind

    def extract_thread_id(self, run_id: str) -> str:
        """The thread a run belongs to. Raises ``InvalidContextError`` when this is no run id."""
        thread = self.parse(run_id).thread_id
        if thread is None:
            raise InvalidContextError("run_id", "is not the id of a run", "give an id made by generate_run_id")
        return thread


def is_anonymous_id(value: object) -> TypeGuard[str]:
    """Whether this is the id of an anonymous context: only the product makes those, and ``validate_id`` refuses
    them.
    """
    return (
        isinstance(value, str) and value.startswith(RESERVED_PREFIX) and UnifiedIDManager().validate(value, "anonymous")
    )


def checked_user_id(value: object) -> str:
    """The id of a user, or of an anonymous context. Raises InvalidContextError for what is neither."""
    return str.__str__(value) if is_anonymous_id(value) else validate_id(value, "user_id")
