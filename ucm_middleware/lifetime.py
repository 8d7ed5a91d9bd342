"""How long a context lives and when it lets go of what: the state machine, and the stack of resources.

A lifetime goes one way: unbound or open, then closing, then closed. Whoever moves it to closing owns the teardown;
everyone else waits for it or goes on. Synchronous releases run where the teardown runs. Each asynchronous release
runs in a task of its own, so that cancelling the request, by whatever means and however often, cannot interrupt it;
only its own deadline can.
"""

import asyncio
import contextlib
import enum
import inspect
import logging
import os
import threading
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Final, Literal, Protocol

import anyio

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.expiry import Timed
from ucm_middleware.resources import ReleaseFailure, ReleaseOutcome, Resource, awaiting, is_only
from ucm_middleware.waiting import Cancelled, in_background, loop_is_live, running_loop, settle, uncancelled, wake

logger = logging.getLogger(__name__)

CANCEL_GRACE: Final = 1.0
"""Seconds a release that ran out of time gets to obey its cancellation before it is left behind."""


class State(enum.Enum):
    UNBOUND = "unbound"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


# An attribute of an enum class costs ten times as much as a global.
UNBOUND: Final = State.UNBOUND
OPEN: Final = State.OPEN
CLOSING: Final = State.CLOSING
CLOSED: Final = State.CLOSED

WEBSOCKET: Final = "a WebSocket connection"
"""What opened the context of one."""

CloseReason = Literal[
    "finished",
    "failed",
    "cancelled",
    "closed",
    "cleared",
    "replaced",
    "evicted",
    "expired",
    "revoked",
    "shutdown",
    "disconnected",
    "slow",
    "lost",
    "forked",
]

HANDLER_GRACE: Final = 5.0
"""Seconds a handler gets to end after its context was closed under it, before its resources are released all the
same.
"""

INTERRUPT: Final = "the user context was closed"
"""What the cancellation of a handler says that is cut off: by that it is told from somebody else's."""

INTERRUPTING: Final[frozenset[str]] = frozenset({"expired", "revoked", "shutdown", "disconnected", "slow", "lost"})
"""The reasons that stop a handler in the middle of its work; after any other it may run on without its context."""


class Releasing(Protocol):
    """What marks the code of a release, and whatever it starts, as the one that may still use the context."""

    def enter(self) -> object:
        """Begin a release, here. Returns what ``leave`` takes."""
        ...

    def leave(self, token: Any) -> None:
        """End a release."""
        ...

    def is_here(self) -> bool:
        """Whether the asking code is, or was started by, a release."""
        ...


class Tenure(Protocol):
    """What a context must hold to be used, where workers share their users. Without that, none is needed."""

    @property
    def is_held(self) -> bool:
        """Whether it is held now."""
        ...


class Journal(Protocol):
    """Writes down what happens to the resources of one context, and counts. Never raises."""

    def bound(self, user_id: str) -> None:
        """The context learned its user."""
        ...

    def entered(self, name: str) -> None:
        """A resource was entered."""
        ...

    def exited(self, name: str, handed_over: bool) -> None:
        """It was released, or handed over to another context."""
        ...

    def failed(self, name: str, reason: str, error: str) -> None:
        """It was not cleanly released: why, and the name of the error's type."""
        ...

    def child_opened(self) -> None:
        """A child was opened."""
        ...

    def denied(self) -> None:
        """The context's code was denied something."""
        ...

    def statistics(self) -> tuple[tuple[str, int], ...]:
        """What there was any of, by name."""
        ...


class Closing:
    """What is to be known of a teardown: most contexts hold nothing when they end, and never have one."""

    __slots__ = (
        "cancelled_before",
        "claimed",
        "failures",
        "interrupted",
        "overdue",
        "releasing",
        "stop",
        "strays_run",
        "waiters",
    )

    def __init__(self) -> None:
        self.claimed = True  # until whoever began the closing has said so
        self.failures: tuple[ReleaseFailure, ...] = ()
        self.interrupted = False
        self.cancelled_before = 0  # how often somebody else had cancelled the task when it was interrupted
        self.overdue: asyncio.TimerHandle | threading.Timer | None = None
        self.releasing: Releasing | None = None
        self.stop: BaseException | None = None
        self.strays_run = False  # the handler was cut off, and what it left running has not ended
        self.waiters: tuple[asyncio.Future[None], ...] = ()


class Lifetime(Timed):
    """The state, the deadline and the resources of one context. Every method may be called from any thread."""

    __slots__ = (
        "_cancelling",
        "_clock",
        "_given",
        "_latest",
        "closing",
        "journal",
        "lease",
        "loop",
        "opened_by",
        "reason",
        "resources",
        "state",
        "task",
        "variables",
    )

    state: State
    opened_by: str | tuple[str, int]
    reason: CloseReason | None
    loop: asyncio.AbstractEventLoop | None
    task: asyncio.Task[Any] | threading.Thread | None  # what the handler runs in, while it runs
    variables: Context | None
    closing: Closing | None
    lease: Tenure | None  # its root's
    journal: Journal | None  # made by the manager when there is something to write down; most contexts never have one
    # The deadline that there would be without credentials that end; only where those do.
    _given: float | None
    _latest: float | None
    _clock: Callable[[], float] | None
    resources: list[Resource] | None

    # One lock for all: it is held for a few instructions, and a lock for each context would cost every request an
    # allocation that almost none needs. Reentrant, because a finalizer or a signal handler may close a context in the
    # middle of them: so nothing is called between a check and the step that it allows, or the check is made again.
    transition = threading.RLock()

    @staticmethod
    def begin(state: State, opened_by: str | tuple[str, int], variables: Context | None = None) -> "Lifetime":
        """A new lifetime. ``variables`` is the Context that its releases run in; a copy of their own when None."""
        lifetime = Lifetime()  # without a constructor, which would cost each request twice as much
        lifetime.state = state
        lifetime.opened_by = opened_by
        lifetime.variables = variables
        lifetime.wait = 0.0
        lifetime.reason = lifetime.deadline = lifetime._given = lifetime._latest = lifetime._clock = None
        lifetime.resources = lifetime.closing = lifetime.loop = lifetime.task = lifetime.journal = None
        lifetime.lease = None
        return lifetime

    @property
    def is_open(self) -> bool:
        state = self.state
        return state is OPEN or state is UNBOUND

    @property
    def is_expired(self) -> bool:
        """True from the deadline on, whether or not anything has noticed yet."""
        return self.deadline is not None and self._clock is not None and self._clock() >= self.deadline

    @property
    def is_lost(self) -> bool:
        """True while another worker may have its place, whether or not anything has noticed yet."""
        lease = self.lease
        return lease is not None and not lease.is_held

    @property
    def why(self) -> str:
        """In a word why it is not to be used, where it is not."""
        return self.reason or ("lost" if self.is_lost and not self.is_expired else "expired")

    @property
    def permits_use(self) -> bool:
        """Whether the context may be used now, here: until its deadline, under its lease, and in its own releases."""
        state = self.state
        if state is OPEN or state is UNBOUND:
            return (self.deadline is None or not self.is_expired) and (self.lease is None or self.lease.is_held)
        if state is not CLOSING or self.closing is None:
            return False
        releasing = self.closing.releasing
        return releasing is not None and releasing.is_here()

    @property
    def failures(self) -> tuple[ReleaseFailure, ...]:
        """What was not released, so far."""
        return () if self.closing is None else self.closing.failures

    @property
    def handler_runs_elsewhere(self) -> bool:
        """Whether a handler is running in the context, in another task or thread than the one that asks."""
        task = self.task
        if isinstance(task, threading.Thread):
            return task is not threading.current_thread()
        return task is not None and (running_loop() is None or asyncio.current_task() is not task)

    @property
    def strays_run(self) -> bool:
        """Whether the teardown waits for what a handler that was cut off has left running."""
        return self.closing is not None and self.closing.strays_run

    @contextlib.contextmanager
    def waiting_for_strays(self) -> Generator[None]:
        """The teardown waits for what the handler has left running, for as long as the block takes."""
        closing = self._closing()
        closing.strays_run = True
        try:
            yield
        finally:
            closing.strays_run = False

    @property
    def has_resources(self) -> bool:
        return bool(self.resources)

    @property
    def is_used(self) -> bool:
        """Whether a resource is held; what plugins wrap with does not count."""
        return any(not resource.of_plugin for resource in tuple(self.resources or ()))

    def where(self) -> str:
        """Where the context was opened, as text for an error."""
        opened_by = self.opened_by
        return opened_by if isinstance(opened_by, str) else f"{opened_by[0]}:{opened_by[1]}"

    def limit(self, latest: float, clock: Callable[[], float]) -> None:
        """Set the latest deadline that there may ever be: the credentials end then."""
        self.renew(latest if self._latest is None else min(latest, self._latest), clock)

    def renew(self, latest: float | None, clock: Callable[[], float]) -> None:
        """Put another in its place, which may be later, or None for credentials without an end."""
        if self._latest is None:
            self._given = self.deadline
        self._clock = clock
        self._latest = latest
        self.deadline = min((at for at in (self._given, latest) if at is not None), default=None)

    def begin_closing(self, reason: CloseReason) -> bool:
        """Move to closing. True for exactly one caller."""
        closing = Closing()
        with self.transition:
            if self.state is not OPEN and self.state is not UNBOUND:
                return False
            if self.closing is None:  # there is one when something came too late for a parent that was closing
                self.closing = closing
            self.state = CLOSING
            self.reason = reason
            return True

    def offer_teardown(self, releasing: Releasing) -> None:
        """Let someone claim the teardown, now that whoever began the closing has said so where it must be known."""
        closing = self._closing()
        closing.releasing = releasing
        closing.claimed = False

    def mark_release(self) -> None:
        """Mark the code that runs here as a release, from now on, if the lifetime is closing."""
        releasing = None if self.closing is None else self.closing.releasing
        if releasing is not None:
            releasing.enter()

    def claim_teardown(self) -> bool:
        """True for exactly one caller, once the lifetime is closing: that one does the teardown."""
        with self.transition:
            closing = self.closing
            if closing is None or closing.claimed or self.state is not CLOSING:
                return False
            closing.claimed = True
            return True

    def finish_closing(self) -> None:
        """Move to closed, and wake whoever waits for it."""
        self.state = CLOSED  # first: who comes to wait from now on sees it
        self.loop = self.task = self.variables = None
        closing = self.closing
        if closing is None:
            return
        closing.releasing = None
        overdue, closing.overdue = closing.overdue, None
        if overdue is not None:
            overdue.cancel()
        waiters, closing.waiters = closing.waiters, ()
        for waiter in waiters:
            with contextlib.suppress(RuntimeError):  # the waiter's loop has gone, and the waiter with it
                waiter.get_loop().call_soon_threadsafe(wake, waiter)

    def leave_to_parent(self) -> None:
        """In a forked child: closed, and nothing is released. What it holds is the parent's."""
        if self.state is not CLOSED:
            self.state = CLOSED
            self.reason = "forked"
            self.task = None

    def _closing(self) -> Closing:
        """The teardown's record, also when the context ended without one."""
        made = Closing()
        with self.transition:
            if self.closing is None:
                self.closing = made
            return self.closing

    def stop_later(self, stop: BaseException) -> None:
        """Keep what stops the interpreter, which a release raised, until the teardown is through."""
        self._closing().stop = stop

    def take_stop(self) -> BaseException | None:
        """What was kept, to be raised now."""
        if self.closing is None:
            return None
        stop, self.closing.stop = self.closing.stop, None
        return stop

    async def wait_closed(self) -> None:
        """Wait until whoever owns the teardown is through with it. A cancellation is raised after, not instead."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        closing = self._closing()
        with self.transition:
            closing.waiters = (*closing.waiters, waiter)
            if self.state is CLOSED:  # looked at last: who closed before found no waiter
                return
        await uncancelled(waiter)

    def run_in_current_task(self) -> None:
        """Note that the handler runs in this task, on this event loop: it is cancelled when the context is cut off."""
        self.loop = loop = asyncio.get_running_loop()
        self.task = task = asyncio.current_task(loop)
        if task is not None:
            self._cancelling = task.cancelling()

    def run_in_current_thread(self) -> None:
        """Note that the handler runs in this thread. Nothing can cancel it: it sees that its context is closed."""
        self.task = threading.current_thread()

    def absorb_interrupt(self, error: BaseException | None) -> bool:
        """Take back the cancellation of an interrupt, in the task of the handler, after it has ended in this error.

        True when it was the only one; False when there was none, or someone else means the whole task too. Before
        Python 3.13 a TaskGroup that failed and was caught may leave a cancellation that nobody means any more: then it
        is told by the error whose cancellation ended the handler.
        """
        closing = self.closing
        if closing is None or not closing.interrupted:
            return False
        task = asyncio.current_task()
        if task is None:
            return False
        closing.interrupted = False
        left = task.uncancel()
        return left <= self._cancelling or (left <= closing.cancelled_before and _is_interrupt(error))

    @property
    def is_interrupted(self) -> bool:
        """Whether the handler was cancelled by an interrupt, and has not ended yet."""
        return self.closing is not None and self.closing.interrupted

    def interrupt(self) -> None:
        """Cancel the handler that runs in this context, unless it is the one that asks."""
        task, loop = self.task, self.loop
        if task is None or isinstance(task, threading.Thread) or loop is None or not loop_is_live(loop):
            return
        if loop is not running_loop() or asyncio.current_task() is not task:
            with contextlib.suppress(RuntimeError):  # the loop was closed in this very moment
                loop.call_soon_threadsafe(self._cancel, task)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        # On the loop's own thread, so that a handler that has returned meanwhile is left alone: the server may
        # already run another user's request in the same task.
        if self.task is task:
            closing = self._closing()
            closing.interrupted = True
            closing.cancelled_before = task.cancelling()
            task.cancel(INTERRUPT)

    def require_loop(self) -> None:
        """Refuse an asynchronous resource of another event loop than this lifetime's, before it is entered."""
        running = running_loop()
        if self.loop is not None and running is not None and self.loop is not running:
            raise ConfigurationError(
                "the asynchronous resources of one context belong to one event loop, and this context lives on "
                "another; open a context of its own on this loop"
            )

    def add(self, resource: Resource) -> bool:
        """Push a resource. False when the teardown has begun: the caller must let go of it at once."""
        if resource.is_async:
            self.require_loop()
        running = running_loop()
        with self.transition:
            if not self.is_open:
                return False
            if self.loop is None:
                self.loop = running
            resources = self.resources
            if resources is None:
                resources = self.resources = []
            resources.append(resource)
            if self.is_open or resource not in resources:  # kept, or released already by a teardown in between
                return True
            resources.remove(resource)
            return False

    def entered(self, resource: Resource) -> None:
        """Put on record that a resource was entered: before anything else can happen to it."""
        if self.journal is not None and not resource.on_record:
            resource.on_record = True
            self.journal.entered(resource.name)

    def discard(self, resource: Resource) -> bool:
        """Forget a resource: its entering failed, or it is released before the others. False when it is not held."""
        with self.transition:
            if not self.resources or resource not in self.resources:
                return False
            self.resources.remove(resource)
            return True

    def hand_over(self, other: "Lifetime") -> None:
        """Forget the resources that ``other`` holds too: it is the one that lets go of them."""
        with self.transition:
            kept = {id(resource.target) for resource in other.resources or ()}
            gone = [resource for resource in self.resources or () if id(resource.target) in kept]
            if gone and self.resources:
                self.resources = [resource for resource in self.resources if resource not in gone]
        for resource in gone:
            self._exited(resource, handed_over=True)

    def release_here(self, error: BaseException | None) -> bool:
        """Release from the top until an asynchronous resource is met. True when nothing is left."""
        while (resource := self._pop()) is not None:
            rest = resource if resource.is_async else self._call(resource, error)
            if rest is not None:
                self._put_back(rest)
                return False
        return True

    async def release(self, error: BaseException | None) -> None:
        """Release everything, top first. Completes whatever cancels it; the cancellation is raised at the end."""
        cancelled = Cancelled()
        # The shield keeps anyio from cancelling again on every turn of the loop; native cancellations arrive all the
        # same.
        with anyio.CancelScope(shield=True):
            while not self.release_here(error):
                resource = self._pop()
                if resource is not None:
                    await self._release_async(resource, error, cancelled)
        cancelled.raise_it()

    async def release_late(self, resource: Resource, error: BaseException | None) -> None:
        """Release a resource apart: it came after the teardown had begun, or goes before. It is reported like the
        others.
        """
        cancelled = Cancelled()
        with anyio.CancelScope(shield=True):
            await self._release_async(resource, error, cancelled)
        cancelled.raise_it()

    def release_late_here(self, resource: Resource, error: BaseException) -> None:
        """The same from synchronous code: in the background where there is an event loop."""
        loop = running_loop()
        rest = resource if resource.is_async else self._call(resource, error)
        if rest is None:
            return
        if loop is None:
            self._unclosed(rest)
        else:
            in_background(loop, self.release_late, rest, error)

    def abandon(self, error: BaseException | None) -> None:
        """Release what can be released here, and report the rest as unclosed: there is no event loop to close it on."""
        while (resource := self._pop()) is not None:
            rest = resource if resource.is_async else self._call(resource, error)
            if rest is not None:
                self._unclosed(rest)

    def _unclosed(self, resource: Resource) -> None:
        owner = resource.owner
        if owner is not None and owner.done():  # it left when its loop ended
            raised = None if owner.cancelled() else owner.exception()
            if raised is None:
                self._exited(resource)
            else:
                self._fail(resource, "failed", _as_exception(resource, raised))
            return
        if inspect.iscoroutine(resource.target):
            resource.target.close()  # so that nothing complains of a coroutine never awaited
        error = RuntimeError(f"{resource.name} was not closed: the event loop that it was opened on is not running")
        self._fail(resource, "unclosed", error)

    def _pop(self) -> Resource | None:
        with self.transition:
            return self.resources.pop() if self.resources else None

    def _put_back(self, resource: Resource) -> None:
        with self.transition:
            assert self.resources is not None
            self.resources.append(resource)

    def targets(self) -> list[tuple[str, object]]:
        """The resources by name, for the search for what two users share."""
        return [(resource.name, resource.target) for resource in tuple(self.resources or ())]

    def _exited(self, resource: Resource, *, handed_over: bool = False) -> None:
        if self.journal is not None and resource.on_record:
            self.journal.exited(resource.name, handed_over)

    def _fail(self, resource: Resource, outcome: ReleaseOutcome, error: Exception) -> None:
        failure = ReleaseFailure(resource.name, outcome, error)
        error.add_note(f"while releasing {failure.name}: {failure.outcome}")
        self._closing().failures += (failure,)
        logger.error("resource not released: %s", failure, exc_info=failure.error)
        if self.journal is not None:
            self.journal.failed(resource.name, outcome, type(error).__name__)

    def _call(self, resource: Resource, error: BaseException | None) -> Resource | None:
        """Run a release where we are. What it raises is noted. Returns what is left of it to be awaited."""
        releasing = None if self.closing is None else self.closing.releasing
        token = None if releasing is None else releasing.enter()
        try:
            outcome = resource.release(error)
            if inspect.isawaitable(outcome):
                return awaiting(resource, outcome)
        except asyncio.CancelledError as raised:
            if raised is not error:
                self._fail(resource, "cancelled", _as_exception(resource, raised))
                return None
        except Exception as raised:  # noqa: BLE001 - whatever a resource raises, the ones below it are still released
            if not is_only(raised, error):
                self._fail(resource, "failed", _without_our_frame(raised))
                return None
        except BaseException as raised:  # noqa: BLE001 - KeyboardInterrupt or SystemExit: raised again at the end
            self.stop_later(raised)
            if self.journal is not None:
                self.journal.failed(resource.name, "failed", type(raised).__name__)
            return None
        finally:
            if releasing is not None and token is not None:
                releasing.leave(token)
        self._exited(resource)
        return None

    async def _run(self, resource: Resource, error: BaseException | None) -> None:
        releasing = None if self.closing is None else self.closing.releasing
        token = None if releasing is None else releasing.enter()
        try:
            outcome = resource.release(error)
            if inspect.isawaitable(outcome):
                await outcome
        finally:
            if releasing is not None and token is not None:
                releasing.leave(token)

    async def _release_async(self, resource: Resource, error: BaseException | None, cancelled: "Cancelled") -> None:
        """Run one release in a task of its own, under its deadline."""
        # Made directly, not by the loop's factory: an eager factory would step it inside a Context that is already
        # entered.
        task = asyncio.Task(
            self._run(resource, error),
            loop=asyncio.get_running_loop(),
            context=self._variables_of_release(),
            name=f"release {resource.name}",
        )
        await settle(task, resource.timeout, cancelled)
        if not task.done():
            task.cancel()
            await settle(task, CANCEL_GRACE, cancelled)
            self._fail(resource, "timed out", _timeout(resource, left_running=not task.done()))
            task.add_done_callback(_retrieve)
        elif task.cancelled():
            self._fail(resource, "cancelled", _as_exception(resource, asyncio.CancelledError()))
        elif (raised := task.exception()) is not None and not is_only(raised, error):
            self._fail(resource, "failed", _as_exception(resource, raised))
        else:
            self._exited(resource)

    def _variables_of_release(self) -> Context | None:
        """The Context that a release runs in. While a handler still runs, which is stepped in the request's own, it is
        a copy of that: whatever is in there would take the handler for a release.
        """
        variables = self.variables
        return variables.copy() if variables is not None and self.handler_runs_elsewhere else variables


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether this is the cancellation of an interrupt, which did not come on top of somebody else's."""
    if not isinstance(error, asyncio.CancelledError):
        return False
    while error is not None:
        if isinstance(error, asyncio.CancelledError) and error.args != (INTERRUPT,):
            return False
        error = error.__context__
    return True


def _retrieve(task: asyncio.Task[None]) -> None:
    """Say how a release ended that was left behind, so that asyncio does not complain of an error nobody saw."""
    if not task.cancelled() and (raised := task.exception()) is not None:
        logger.error("%s ended late", task.get_name(), exc_info=raised)


def _timeout(resource: Resource, *, left_running: bool) -> TimeoutError:
    ignored = "; it ignored its cancellation and was left running" if left_running else ""
    return TimeoutError(f"{resource.name} did not let go within {resource.timeout:g} seconds{ignored}")


def _without_our_frame(raised: Exception) -> Exception:
    """The error without the frame that called the release: it holds the lifetime, which holds the error."""
    trace = raised.__traceback__
    return raised.with_traceback(None if trace is None else trace.tb_next)


def _as_exception(resource: Resource, raised: BaseException) -> Exception:
    """What was raised, as something that may stand in an ExceptionGroup: a cancellation may not."""
    if isinstance(raised, Exception):
        return _without_our_frame(raised)
    wrapped = RuntimeError(f"the release of {resource.name} was interrupted by {type(raised).__name__}")
    wrapped.__cause__ = raised
    return wrapped


def _renew_transition() -> None:
    Lifetime.transition = threading.RLock()


os.register_at_fork(after_in_child=_renew_transition)
