"""Closing a context and its children: in which order, on which event loop, and after which handler."""

import asyncio
import logging
import threading
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Context
from typing import Final

import anyio

from ucm_middleware.current import Inside, ambient
from ucm_middleware.errors import ContextClosedError, ContextLimitError
from ucm_middleware.forking import leave_to_parent, renewed_after_fork
from ucm_middleware.lifetime import (
    CLOSED,
    CLOSING,
    HANDLER_GRACE,
    INTERRUPTING,
    WEBSOCKET,
    CloseReason,
    Lifetime,
    Releasing,
)
from ucm_middleware.resources import ReleaseFailure
from ucm_middleware.strays import Stray, Strays
from ucm_middleware.waiting import Cancelled, in_background, loop_is_live, running_loop, settle

logger = logging.getLogger(__name__)

MAX_CHILDREN: Final = 100
"""How many live children one context may have."""

STRAY_PAUSE: Final = 0.02
"""Seconds between two looks at whether a stray has ended: of a thread nothing tells."""

ENDED_WELL: Final = frozenset({"finished", "closed", "cleared"})
"""The reasons after which resources see no error: what they hold may be kept."""

HANDLERS_OWN: Final = frozenset({"failed", "cancelled"})
"""The reasons that are an error's, which came out of the code that used the context."""


class Closable:
    """A node in a tree of contexts, each with a lifetime. Children close before their parent's resources do."""

    __slots__ = ("_children", "_lifetime", "_parent")

    _lifetime: Lifetime
    _parent: "Closable | None"
    _children: "list[Closable] | None"

    @property
    @abstractmethod
    def request_id(self) -> str: ...

    @property
    def lifetime(self) -> Lifetime:
        """The state machine behind this context."""
        return self._lifetime

    @property
    def is_open(self) -> bool:
        """True until this context, or one above it, begins to close."""
        node: Closable | None = self
        while node is not None:
            if not node._lifetime.is_open:
                return False
            node = node._parent
        return True

    @property
    def needs_waiting(self) -> bool:
        """True when something must be released or closed with this context, or somebody is closing it already."""
        lifetime = self._lifetime
        return lifetime.has_resources or bool(self._children) or lifetime.state is CLOSING

    def require_usable(self) -> None:
        """Raise ContextClosedError from the closing on, and from the deadline on even when nothing has noticed it
        yet.
        """
        lifetime = self._lifetime
        if not lifetime.permits_use:
            raise self._closed_error()
        parent = self._parent if lifetime.is_open else None  # what is being released here may be used to the end
        while parent is not None:
            if not parent._lifetime.is_open or parent._lifetime.is_expired:
                raise parent._closed_error()
            parent = parent._parent

    def close(self, reason: CloseReason = "closed", error: BaseException | None = None) -> None:
        """Close from synchronous code, in any thread. Never raises what a resource raises: it is logged and recorded.

        Asynchronous resources are released on the event loop that they were opened on, after this returns; so is
        everything, when a handler runs in the context that is not the one who closes it. ``error`` is what resources
        see as the reason for their exit; after anything but an ordinary end they see one.
        """
        lifetime = self._lifetime
        handler = lifetime.task
        begun = self._begin(reason)
        if self._waits_for_handler():
            if begun:
                self._tear_down_after_handler()
        elif lifetime.claim_teardown():
            if begun and isinstance(handler, threading.Thread) and handler is not threading.current_thread():
                self._tear_down_apart(error)  # it has ended while the closing was put on record
            else:
                self._tear_down_at_home(error)

    async def aclose(
        self, reason: CloseReason = "closed", error: BaseException | None = None
    ) -> tuple[ReleaseFailure, ...]:
        """Close, and wait until every resource is released or reported. Returns the failures.

        A cancellation that arrives meanwhile is raised at the end. When something else is closing the context already,
        waits for that; but not from inside of a handler that was cut off, for which the teardown itself waits.
        """
        lifetime = self._lifetime
        begun = self._begin(reason)
        if self._waits_for_handler():
            if begun:
                self._tear_down_after_handler()
            if not self._is_ambient():
                await lifetime.wait_closed()
        elif not lifetime.claim_teardown():
            await lifetime.wait_closed()
        elif lifetime.loop is None or lifetime.loop is asyncio.get_running_loop():
            # Where someone else has begun it, the teardown was left for when the handler has ended.
            cut_off = reason == "cancelled" or (lifetime.reason in INTERRUPTING and not begun)
            await self._tear_down(error, after_strays=cut_off)
        else:
            self._tear_down_at_home(error)
            await lifetime.wait_closed()
        return lifetime.failures

    def leave_to_parent(self) -> None:
        """In a forked child: nothing in the tree that this belongs to is usable any more, and nothing released here."""
        root = self
        while root._parent is not None:
            root = root._parent
        leave_to_parent(root)
        nodes = [root]
        for node in nodes:
            node._lifetime.leave_to_parent()
            nodes += node._children or ()

    # What a context adds.

    @abstractmethod
    def _say_closing(self) -> None:
        """The closing has begun: say so."""

    @abstractmethod
    def _releasing(self) -> Releasing:
        """What marks the releases."""

    @abstractmethod
    def _wipe(self) -> Mapping[str, object] | None:
        """Empty the data. Returns what the record of the end needs of it, None for nothing."""

    @abstractmethod
    def _say_closed(self, metadata: Mapping[str, object] | None) -> None:
        """The teardown is through: say so."""

    @property
    @abstractmethod
    def _is_of_run(self) -> bool:
        """Whether it was opened for the run of an agent."""

    @property
    @abstractmethod
    def _strays(self) -> Strays:
        """Who looks for what a handler that was cut off has left running."""

    # The tree.

    def _adopt(self, child: "Closable") -> bool:
        """Take a child in. False when the teardown has begun, so that no child outlives it."""
        with Lifetime.transition:
            children = self._children
            if children is None:
                children = self._children = []
            full = len(children) >= MAX_CHILDREN
            if not full:
                children.append(child)
                if self.is_open:
                    return True
                self._forget(child)
        if full:
            raise ContextLimitError("children", MAX_CHILDREN, "close the children that are done")
        return False

    def _forget(self, child: "Closable") -> None:
        with Lifetime.transition:
            if self._children and child in self._children:
                self._children.remove(child)

    # The steps.

    def close_if_lost(self) -> None:
        """Close what another worker may have the place of by now."""
        if self._lifetime.is_lost:
            self.close("lost")

    def _begin(self, reason: CloseReason) -> bool:
        lifetime = self._lifetime
        if lifetime.is_lost and (reason in ENDED_WELL or reason in HANDLERS_OWN):
            reason = "lost"  # nobody has noticed yet, or its handler by the error that it got
        if not lifetime.begin_closing(reason):
            return False
        self._say_closing()
        if reason in INTERRUPTING and not (reason == "revoked" and self._may_still_answer()):
            lifetime.interrupt()
        lifetime.offer_teardown(self._releasing())
        return True

    def _may_still_answer(self) -> bool:
        """Whether a request's own code asks, in whichever of its tasks or threads: who signs out is to be told. The
        handler of a connection may wait for its client, who would hold it open.
        """
        return self._lifetime.opened_by != WEBSOCKET and self._is_ambient()

    def _closed_error(self) -> ContextClosedError:
        lifetime = self._lifetime
        return ContextClosedError(self.request_id, lifetime.where(), lifetime.why)

    def _seen_error(self, error: BaseException | None) -> BaseException | None:
        """What resources see: a transaction must not be committed because its request was cut off."""
        return self._closed_error() if error is None and self._lifetime.reason not in ENDED_WELL else error

    def _waits_for_handler(self) -> bool:
        """Whether a handler must end first: not when it is the one that closes, in whichever of its tasks or
        threads.
        """
        lifetime = self._lifetime
        if lifetime.strays_run:
            return True
        return lifetime.handler_runs_elsewhere and (lifetime.reason in INTERRUPTING or not self._is_ambient())

    def _is_ambient(self) -> bool:
        return self._is_around(ambient.get())

    def _is_around(self, value: Inside | None) -> bool:
        """Whether what code runs inside of belongs to this context, or to one below it."""
        node: Closable | None = None if value is None else value.context
        while node is not None and node is not self:
            node = node._parent
        return node is self

    def _tear_down_after_handler(self) -> None:
        """Leave the teardown to the task or thread that runs the handler, for when it has ended.

        What the handler opened itself stands above the resources here and must be undone first: a connection that went
        back to its pool now would be another user's while this handler still rolls back on it.
        """
        lifetime = self._lifetime
        loop, task = lifetime.loop, lifetime.task  # read once: the handler may end meanwhile
        if isinstance(task, threading.Thread) and task.is_alive():
            self._wait_for_thread()
            return
        if loop is not None and loop_is_live(loop):
            with suppress(RuntimeError):  # the loop was closed in this very moment
                loop.call_soon_threadsafe(self._wait_for_handler, loop)
                return
        self._tear_down_overdue()

    def _wait_for_thread(self) -> None:
        closing = self._lifetime.closing
        if closing is not None:
            closing.overdue = timer = threading.Timer(HANDLER_GRACE, self._tear_down_overdue)
            timer.daemon = True
            timer.start()
            if self._lifetime.state is CLOSED:  # looked at last: who closed before found no timer
                timer.cancel()

    def _wait_for_handler(self, loop: asyncio.AbstractEventLoop) -> None:
        closing = self._lifetime.closing
        if closing is not None and self._lifetime.state is CLOSING:
            # In an empty Context: a timer keeps its own until it is due, cancelled or not, and all that is in there.
            timer = loop.call_later(HANDLER_GRACE, self._tear_down_overdue, context=Context())
            closing.overdue = timer

    def _tear_down_overdue(self) -> None:
        if self._lifetime.claim_teardown():
            logger.warning("the handler of %s did not end when its context closed: its resources are released", self)
            self._tear_down_at_home(None)

    def _tear_down_apart(self, error: BaseException | None) -> None:
        """The teardown in a thread of its own: what a handler's thread held is none of the work of who closes it."""
        releasing = threading.Thread(
            target=self._tear_down_at_home, args=(error,), name="ucm-middleware release", daemon=True
        )
        try:
            releasing.start()
        except RuntimeError:  # there can be no more threads
            self._tear_down_at_home(error)

    def _tear_down_at_home(self, error: BaseException | None) -> None:
        """The teardown on the context's event loop, when it is live; else here, as far as it goes."""
        home = self._lifetime.loop
        here = running_loop()
        if home is None or home is here:
            self._tear_down_here(here, error)
            return
        if loop_is_live(home):
            with suppress(RuntimeError):  # the loop was closed in this very moment
                home.call_soon_threadsafe(self._tear_down_here, home, error)
                return
        self._tear_down_here(None, error)

    def _tear_down_here(self, loop: asyncio.AbstractEventLoop | None, error: BaseException | None) -> None:
        """The teardown, as far as it goes without waiting; the rest in a task on ``loop``, or reported without one."""
        error = self._seen_error(error)
        waits_for = self._close_children(error)
        if waits_for is None:
            if self._lifetime.release_here(error):
                self._finish()
                return
        else:
            loop = loop or waits_for._closes_on()
        if loop is not None:
            with suppress(RuntimeError):  # the loop was closed in this very moment
                in_background(loop, self._tear_down, error)
                return
        while waits_for is not None:  # in another thread, and there is nothing to wait with: the others close now
            waits_for = self._close_children(error, before=waits_for)
        self._lifetime.abandon(error)
        self._finish()

    def _close_children(self, error: BaseException | None, before: "Closable | None" = None) -> "Closable | None":
        """Close the children, or those before this one, last first, until one must be waited for. Returns that one."""
        children = tuple(self._children or ())
        last = children.index(before) if before in children else len(children)
        for child in reversed(children[:last]):
            child.close(self._lifetime.reason or "closed", error)
            if child.lifetime.state is not CLOSED:
                return child
        return None

    def _closes_on(self) -> asyncio.AbstractEventLoop | None:
        """A live event loop on which this one lets go of what it holds, or one of its children does."""
        nodes = [self]
        for node in nodes:
            loop = node._lifetime.loop
            if loop is not None and loop_is_live(loop):
                return loop
            nodes += node._children or ()
        return None

    async def _tear_down(self, error: BaseException | None, *, after_strays: bool = False) -> None:
        error = self._seen_error(error)
        lifetime = self._lifetime
        cancelled = Cancelled()
        try:
            if after_strays:
                await self._strays_ended(cancelled)
            for child in reversed(tuple(self._children or ())):
                try:
                    await child.aclose(lifetime.reason or "closed", error)
                except asyncio.CancelledError as raised:
                    cancelled.keep(raised)
            if not lifetime.release_here(error):
                await lifetime.release(error)
        finally:
            self._finish()
        cancelled.raise_it()

    async def _strays_ended(self, cancelled: Cancelled) -> None:
        """End what the handler that was cut off has left running, as far as it can be ended, and wait for that; for the
        rest too where something is to be released, which it may use to the end.
        """
        loop = asyncio.get_running_loop()
        latest = loop.time() + HANDLER_GRACE
        with self._lifetime.waiting_for_strays(), anyio.CancelScope(shield=True):
            while running := await self._strays_to_wait_for(cancelled):  # again: one that ended may have begun another
                while running and loop.time() < latest:
                    await settle(loop.create_future(), STRAY_PAUSE, cancelled)
                    running = [stray for stray in running if stray.runs]
                if running:
                    text = "%s of %s did not end when its context closed: its resources are released"
                    logger.warning(text, running[0], self)
                    return

    async def _strays_to_wait_for(self, cancelled: Cancelled) -> list[Stray]:
        strays = await self._strays.of(self, cancelled)
        return [stray for stray in strays if stray.end() or self._holds_something]

    @property
    def _holds_something(self) -> bool:
        """Whether what it runs may use what is to be released, be it the parent's. What outlives the run of an agent is
        listed, and loses its handles.
        """
        uses_parents = self._parent is not None and not self._is_of_run
        return uses_parents or self._lifetime.has_resources or bool(self._children)

    def _finish(self) -> None:
        """Wipe the data, let go of everything that could keep this context alive, and say so."""
        metadata = self._wipe()
        lifetime = self._lifetime
        stop = lifetime.take_stop()
        parent, self._parent = self._parent, None
        self._children = None
        if parent is not None:
            if stop is not None and not parent.is_open:  # the parent is closing: it goes on, and stops at the end
                parent.lifetime.stop_later(stop)
                stop = None
            parent._forget(self)
        lifetime.finish_closing()
        self._say_closed(metadata)
        if stop is not None:
            raise stop


class _AmbientOfFork:
    """What the code that forked belongs to: the child goes on outside of it, as do the tasks that it starts."""

    def after_fork(self) -> None:
        value = ambient.get()
        if value is not None:
            ambient.set(None)
            if value.context is not None:
                value.context.leave_to_parent()


_ambient_of_fork = _AmbientOfFork()
renewed_after_fork(_ambient_of_fork)


def close_apart(node: Closable, reason: CloseReason) -> None:
    """Close another's without doing its releases here: they may be slow, and are nothing of the asker's."""
    loop = node.lifetime.loop
    if not node.needs_waiting:
        node.close(reason)
        return
    if loop is not None and loop_is_live(loop):
        with suppress(RuntimeError):  # the loop was closed in this very moment
            loop.call_soon_threadsafe(node.close, reason, context=Context())
            return
    threading.Thread(target=node.close, args=(reason,), name="ucm-middleware release", daemon=True).start()
