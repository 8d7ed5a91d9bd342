"""The census: after the teardown of a context, what still holds it, and what is done about that."""

import asyncio
import gc
import logging
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from contextvars import Context
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Final, NamedTuple, cast

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.census.holder import Holder, running
from ucm_middleware.census.policy import CensusAction, CensusPolicy
from ucm_middleware.census.referrers import Search, Trace
from ucm_middleware.census.survey import cancelled_timers, survey, whose
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextLeakError

logger = logging.getLogger(__name__)

SHARE: Final = 20
"""After a look, so many times its duration pass before the next: together they take a twentieth of the loop's time."""

SETTLING: Final = 1.0
"""Seconds that what no task, timer or thread explains has to go, by a garbage collection, before it is searched for."""

SEARCH_SECONDS: Final = 0.25
"""How long one look searches the heap, give or take one pass over it."""

SUSPECTS: Final = 1000
"""How many contexts wait for a look at most; of more, the oldest are let go unseen."""

_COUNTING: Final = 3
"""The references that counting adds: the caller's name for the context, its name here, and the argument."""

_SCOPE: Final = frozenset({"ucm_middleware.context", "user_context"})
"""The keys under which a scope, and the state in it, have the context."""

_LOOPS: Final = (asyncio.AbstractEventLoop,)
"""No global holds the loop that runs, and it holds its executor."""

_GENERATORS: Final = (GeneratorType, AsyncGeneratorType, CoroutineType)


class Suspect(NamedTuple):
    """A context that had more references than it should. It is not kept by this.

    ``expected`` is how many it may have while the server keeps its scope; None for a context that the application made:
    that it goes on referring to it is its own affair.
    """

    context: "weakref.ref[UserExecutionContext]"
    expected: int | None
    is_settled: bool = False


class Census:
    """Counts the references to each context that has closed, and looks closer where there are too many.

    The count is exact: where nothing that a request started goes on, only its scope refers to the context. Whatever
    began in the request has a copy of its ``contextvars.Context``, which refers to it once more. What has only to be
    let go of yet, such as the loop's last callback, is gone a turn of the loop later: so the closer look comes then,
    one for all suspects of that turn.
    """

    __slots__ = ("_allowed", "_next", "_planned_in", "_searches", "_suspects", "_trail", "action")

    def __init__(self, policy: CensusPolicy, action: CensusAction, trail: AuditTrail) -> None:
        self.action = action
        self._allowed = frozenset(policy.allow)
        self._searches = policy.search
        self._trail = trail
        self._suspects: deque[Suspect] = deque(maxlen=SUSPECTS)
        self._planned_in: asyncio.AbstractEventLoop | None = None  # one that has ended takes its plan along
        self._next = 0.0

    def count(self, context: UserExecutionContext, scope: Mapping[str, Any], key: str) -> bool:
        """Suspect a context that more refers to than its scope, which has it under ``key`` and in its state. Returns
        whether it is suspected.
        """
        expected = (scope.get(key) is context) + _is_state_of(scope.get("state"), context)
        if references(context) - 1 > expected:  # the caller has a name for it too
            self.suspect(context, expected)
            return True
        return False

    def suspect(self, context: UserExecutionContext, expected: int | None) -> None:
        """Look at a context that has closed, soon; under "cancel" and "raise" at once too. ``expected`` is as of a
        Suspect.
        """
        if self.action in {"cancel", "raise"} and (holders := self._running_in(context)):
            self._tell(context, holders)
            return
        self._suspects.append(Suspect(weakref.ref(context), expected))
        self._plan(0.0)

    def require_nothing(self, context: UserExecutionContext) -> None:
        """Under "raise": ContextLeakError when something runs in a context that was suspected."""
        if self.action == "raise" and (holders := self._running_in(context)):
            raise ContextLeakError(context.request_id, context.lifetime.where(), [str(one) for one in holders])

    def _plan(self, wait: float) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread without an event loop; what is not due yet waits for the next one's
            if time.monotonic() >= self._next:
                self._look()
            return
        if self._planned_in is loop:
            return
        self._planned_in = loop
        # In an empty Context: a handle keeps its own, and what is counted here is who keeps a context.
        wait = max(wait, self._next - time.monotonic())
        if wait > 0:
            loop.call_later(wait, self._look, context=Context())
        else:
            loop.call_soon(self._look, context=Context())

    def _look(self) -> None:
        began = time.perf_counter()
        self._planned_in = None
        suspects, self._suspects = self._suspects, deque(maxlen=SUSPECTS)
        held = {context: suspect for suspect in suspects if (context := _still_held(suspect)) is not None}
        if not held:
            return
        for context, holders in self._holders(held).items():
            self._tell(context, holders)
        self._next = time.monotonic() + SHARE * (time.perf_counter() - began)
        if self._suspects:
            self._plan(SETTLING)

    def _holders(self, held: Mapping[UserExecutionContext, Suspect]) -> dict[UserExecutionContext, list[Holder]]:
        running_in = survey(held)
        found = {context: left for context, one in running_in.items() if (left := self.not_allowed(one))}
        if not self._searches:
            return found
        settled: dict[UserExecutionContext, bool] = {}
        for context, suspect in held.items():
            if context not in running_in and suspect.is_settled:
                settled[context] = suspect.expected is not None
            elif context not in running_in:
                self._suspects.append(suspect._replace(is_settled=True))
        for context, holder in search(settled, SEARCH_SECONDS, without=(held,)).items():
            if holders := self.not_allowed((holder,)):
                found[context] = holders
        return found

    def _running_in(self, context: UserExecutionContext) -> list[Holder]:
        return self.not_allowed(survey((context,)).get(context, ()))

    def not_allowed(self, holders: Iterable[Holder]) -> list[Holder]:
        """Those that the policy does not name."""
        return [holder for holder in holders if holder.name not in self._allowed]

    def _tell(self, context: UserExecutionContext, holders: list[Holder]) -> None:
        texts = [str(holder) for holder in holders]
        if self.action == "cancel":
            for cancel in [holder.cancel for holder in holders if holder.cancel is not None]:
                cancel()
        try:
            self._trail.outlived(context, [holder.kind for holder in holders], texts)
            about = f"context {context.request_id}, opened by {context.lifetime.where()}, is closed and still held by"
            logger.warning("%s %s", about, "; ".join(texts))
            if self.action == "warn":  # which Python shows where it is told to, and tests make an error of
                warnings.warn(f"{about} {'; '.join(texts)}", ResourceWarning, stacklevel=2)
        except Exception:  # the ledger's, and a warning that is an error: the request is over
            logger.exception("what still holds a context could not be told")


def references(context: UserExecutionContext) -> int:
    """How many references there are to a context, besides the caller's one name for it."""
    return sys.getrefcount(context) - _COUNTING


def search(
    contexts: Mapping[UserExecutionContext, bool], seconds: float, without: Iterable[object] = ()
) -> dict[UserExecutionContext, Holder]:
    """What refers to contexts, by a path from a global without its keys, which may name other users. Nothing for those
    that only wait for the garbage collector, or that the scope refers to, which the server keeps as long as it likes.

    Each comes with whether it is a request's, and not one that the application made, and may keep.
    """
    if not contexts:
        return {}
    ways = _ways_to(contexts)
    scopes: list[object] = [one for one in gc.get_referrers(*contexts) if _is_scope(one)]
    passed_over = *without, contexts, ways, *ways, scopes, *scopes, *cancelled_timers()
    traces = Search(seconds=seconds, ends=_LOOPS, without=passed_over).back_from(contexts, ways)
    found: dict[UserExecutionContext, Holder] = {}
    for context, is_request in contexts.items():
        trace = traces.get(id(context))
        holder = None if trace is None else _holder_of(trace, is_request=is_request)
        if holder is not None:
            found[context] = holder
    return found


def _ways_to(contexts: Mapping[UserExecutionContext, bool]) -> list[tuple[Context, UserExecutionContext]]:
    """Each ``contextvars.Context`` that there is of code in one of these contexts. To find them by going back, through
    what they are made of, would take three steps more.
    """
    there_are: list[Context] = [one for one in gc.get_objects() if type(one) is Context]
    return [(one, context) for one in there_are if (context := whose(one)) is not None and context in contexts]


def _holder_of(trace: Trace, *, is_request: bool) -> Holder | None:
    if not is_request and not any(type(value) is Context for value in trace.objects):
        return None
    for value in trace.objects:
        if type(value) in _GENERATORS:
            name, where = running(value)
            kept = f"kept in {trace.up_to(type(value)).shown(0)}"
            return Holder("generator", name, f"{where}, {kept}" if where else kept)
    path = trace.up_to(Context).shown(0)
    if any(type(value).__name__ == "_WorkItem" for value in trace.objects):
        return Holder("executor job", path)
    return None if issubclass(type(trace.objects[0]), _LOOPS) else Holder("reference", path)


def _is_state_of(value: object, context: UserExecutionContext) -> bool:
    """Whether a context is in the state of a scope, where the app may have put anything, or nothing."""
    return type(value) is dict and cast("dict[str, object]", value).get("user_context") is context


def _is_scope(value: Any) -> bool:
    return type(value) is dict and not _SCOPE.isdisjoint(cast("dict[object, object]", value))


def _still_held(suspect: Suspect) -> UserExecutionContext | None:
    context = suspect.context()
    if context is None or suspect.is_settled:  # the server may have let go of the scope by then, and so of the count
        return context
    return None if references(context) == suspect.expected else context
