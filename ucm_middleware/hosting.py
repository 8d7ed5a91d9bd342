"""Hosting: how contexts come to live under a manager, what they tell it, and how they are closed from outside."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Literal

from ucm_middleware.agents.catalog import AgentCatalog
from ucm_middleware.agents.launching import Launcher
from ucm_middleware.agents.policy import AgentPolicy
from ucm_middleware.agents.runs import AgentRuns
from ucm_middleware.audit.ledger import DurableLedger, Ledger, NoLedger
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import UserMention, mention
from ucm_middleware.audit.trail import CUT_OFF, AuditTrail
from ucm_middleware.census.census import Census
from ucm_middleware.census.policy import CensusPolicy
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.links import Links
from ucm_middleware.cluster.opening import open_cluster
from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.state import Figures
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.guard import EgressGuard
from ucm_middleware.egress.policy import EgressPolicy
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import (
    ClusterUnavailableError,
    ConfigurationError,
    ContextLimitError,
    CrossUserAccessError,
    IdentityConflictError,
    LedgerUnavailableError,
    ManagerDrainingError,
    UserContextError,
)
from ucm_middleware.events.hub import Hub
from ucm_middleware.events.policy import EventPolicy
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.guard import Guard
from ucm_middleware.host import ClosingInspector
from ucm_middleware.ids import UnifiedIDManager
from ucm_middleware.inspector import Inspector
from ucm_middleware.keys import OwnerKeys
from ucm_middleware.leasing import Leasing
from ucm_middleware.lifetime import OPEN, UNBOUND, WEBSOCKET, Journal, Lifetime
from ucm_middleware.plugins import load_hooks
from ucm_middleware.reachability import IsolationPolicy
from ucm_middleware.registry import Displaced, Key, Limits, Registry
from ucm_middleware.revocation import Revocation
from ucm_middleware.secret import SecretRing
from ucm_middleware.settings import checked_life
from ucm_middleware.strays import Strays
from ucm_middleware.sweeper import Sweeper
from ucm_middleware.teardown import close_apart
from ucm_middleware.telemetry import Telemetry
from ucm_middleware.waiting import running_loop

logger = logging.getLogger(__name__)


class Hosting:
    """The parts of a manager, put together, and what its contexts need of it."""

    def __init__(
        self,
        limits: Limits,
        *,
        ttl: float | None,
        environment: IsolatedEnvironment,
        ledger: Ledger | None,
        audit: Literal["strict", "async", "off"],
        is_open: bool,
        secret: str | bytes | None,
        previous_secrets: Sequence[str | bytes] | None,
        clock: Callable[[], float],
        plugins: Sequence[object],
        telemetry: bool,
        events: EventPolicy,
        agents: AgentPolicy,
        egress: EgressPolicy | None,
        isolation: IsolationPolicy,
        census: CensusPolicy,
        cluster: ClusterPolicy | str | None,
    ) -> None:
        self.ttl = checked_life(ttl)
        self.environment = environment
        self.ids = UnifiedIDManager()
        self._clock = clock
        self.audit = audit
        if ledger is None:
            ledger = NoLedger() if audit == "off" else MemoryLedger()
        self._durable_ledger = ledger if isinstance(ledger, DurableLedger) else None
        self._sweeper = Sweeper(self.sweep, self._next_wake, clock)
        self._trail = AuditTrail(ledger, clock, self._sweeper.plan, is_strict=audit == "strict")
        self.hooks = load_hooks(plugins, self.environment)
        self._guard = Guard(self._trail, self.hooks, is_open=is_open)
        self._secrets = SecretRing.from_settings(secret, previous_secrets, self.environment)
        self.keys = OwnerKeys(self._secrets, self._guard.denied)
        if self._durable_ledger is not None:
            self._durable_ledger.start(self._secrets)
        self._registry = Registry(limits, clock)
        self.cluster = open_cluster(
            cluster, self.environment, self._secrets, None if clock is time.monotonic else clock
        )
        """This worker, where several share their users; None where it stands alone."""
        self._leasing = None if self.cluster is None else Leasing(self.cluster, self._registry, self._trail)
        self.owned_types = tuple(self.hooks.owned_types())
        self._inspector = Inspector(isolation, self.hooks.shared_types(), self._registry.live, self._trail)
        self.closing_inspector: ClosingInspector | None = self._inspector if isolation.sample > 0 else None
        self._hub = Hub(events, clock, self._sweeper.plan)
        self._egress = None if egress is None else EgressGuard(egress, self._trail, clock, self._sweeper.plan)
        self._hub.watch = self._egress
        self._revocation = Revocation(self._registry, self._hub, self._trail, self.hooks)
        self._links: Links | None = None
        if self.cluster is not None:
            self._links = Links(self.cluster, self._hub, self._secrets, self._trail, self._revocation.apply)
            self._revocation.notices = self._links.notices
        self.telemetry = Telemetry(
            self._trail, self._secrets, self._live, self._lag, self._late, self._figures, wanted=telemetry
        )
        self.agents = AgentRuns(self._hub, self._trail, self.telemetry)
        action = census.action or ("record" if environment.is_production else "warn")
        self.census = None if action == "off" else Census(census, action, self._trail)
        self._catalog = AgentCatalog()
        self._launcher = Launcher(agents, self._catalog, self.agents, self._guard, self.hooks, self._trail)
        self._start_idle()
        renewed_after_fork(self)
        weakref.finalize(self, self._sweeper.stop).atexit = False
        weakref.finalize(self, self._trail.tell_counted)  # also when the interpreter ends
        if self.cluster is not None:
            weakref.finalize(self, self.cluster.end_soon).atexit = False

    def after_fork(self) -> None:
        """Begin anew in a forked child: what is under way in the parent ends there."""
        for context in self._closing:
            context.leave_to_parent()
        self._start_idle()

    def _start_idle(self) -> None:
        self._draining = False
        self._closing: set[UserExecutionContext] = set()
        self.strays = Strays(self._clock)
        self._drained: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, UserExecutionContext | None]] = []

    @property
    def guard(self) -> Guard:
        """Who decides who may touch whose contexts."""
        return self._guard

    @property
    def egress(self) -> EgressGuard | None:
        """What looks for protected values in what is sent; None without an ``EgressPolicy``."""
        return self._egress

    # Coming to live here.

    def _open_for_connection(
        self,
        user_id: str | None,
        ttl: float | None,
        variables: Context | None,
        websocket: bool,
        lease: Lease | None = None,
    ) -> UserExecutionContext:
        """A context for a request or connection; anonymous without a user. For the middleware, which has checked
        the id, and has waited for the lease where it could.
        """
        if self._draining:
            self._refuse_while_draining(user_id)
        core = self.ids.generate_core()
        where = WEBSOCKET if websocket else "an HTTP request"
        context = object.__new__(UserExecutionContext)
        if user_id is None:
            lifetime = Lifetime.begin(UNBOUND, where, variables)
            context._start(self.ids.generate_anonymous_id(), core, lifetime, True)
        else:
            lifetime = Lifetime.begin(OPEN, where, variables)
            context._start(user_id, core, lifetime, False)
        if websocket:
            context._websocket_client_id = core
        context._host = self
        try:
            if self._leasing is not None and user_id is not None:
                self._leasing.let_live(context, self._leasing.take_now(context, user_id) if lease is None else lease)
            displaced = self._registry.admit(context, ttl)
        except UserContextError as error:
            raise self._not_admitted(error, context, "connection") from None
        try:
            if displaced is not None:
                self._make_way(displaced, context, "connection")
            self._trail.connected(context)
            if lifetime.deadline is not None:
                self._sweeper.plan(lifetime.deadline)
        except BaseException:
            context.close("failed")  # what is not on record does not live
            raise
        if self.hooks.context_opened:
            self.hooks.context_opened(context)
        return context

    def _register(self, context: UserExecutionContext, key: Key, ttl: float | None) -> None:
        """Let a context live here under a key."""
        if self._draining:
            self._refuse_while_draining(context.user_id)
        was_here = context._host is self
        if not context._attach(self):
            raise ConfigurationError("the context lives under another manager")
        try:
            self._bind_session(context)
        except BaseException:
            if not was_here:
                context._detach()
            raise
        displaced: Displaced = {}
        present: UserExecutionContext | None = None
        try:
            if self._leasing is not None and context._lifetime.lease is None:
                present = self._leasing.lease(context, key)
            # So that the user too finds it by this text: from inside, it means the pair.
            also = (context.user_id, key) if isinstance(key, str) and key != context.user_id else None
            displaced.update(self._registry.insert(context, key, ttl, self.ttl, also))
            self._require_still_open(context)
        except UserContextError as error:
            self._close_displaced(displaced)
            self._give_back_lease(context, present)
            if not was_here:
                context._detach()
            raise self._recorded(error, context, "set_context", key) from None
        self._close_displaced(displaced, context)
        if present is not None:
            present.close("replaced")  # it has no lease any more
        self._record_opening(context, "set_context", is_new=not was_here)

    def _admit(self, context: UserExecutionContext, ttl: float | None, source: str) -> None:
        """Let a new context live here, under the pair of its user and its request."""
        present = None
        try:
            if self._leasing is not None:
                present = self._leasing.lease(context, (context._user_id, context.request_id))
            displaced = self._registry.admit(context, ttl)
        except UserContextError as error:
            self._give_back_lease(context, present)
            raise self._not_admitted(error, context, source) from None
        if displaced is not None:
            self._make_way(displaced, context, source)
        if present is not None:
            present.close("replaced")  # it has no lease any more

    def _not_admitted(self, error: UserContextError, context: UserExecutionContext, source: str) -> UserContextError:
        self._give_back_lease(context)
        context._detach()
        return self._recorded(error, context, source, (context.user_id, context.request_id))

    def _give_back_lease(self, context: UserExecutionContext, present: UserExecutionContext | None = None) -> None:
        """A context needs its lease no more, if it has one: the one that it took it over from does, where it lives."""
        if self._leasing is not None and context._lifetime.lease is not None:
            self._leasing.give_back(context, present)

    def _make_way(self, displaced: Displaced, context: UserExecutionContext, source: str) -> None:
        """Close what a new context took the place of."""
        try:
            self._require_still_open(context)
        except UserContextError as error:
            self._close_displaced(displaced)
            raise self._not_admitted(error, context, source) from None
        self._close_displaced(displaced, context)

    def _refuse_while_draining(self, user_id: str | None) -> None:
        if self._guard.acting_user() is None:  # what runs already may still finish
            error = ManagerDrainingError("the server is shutting down")
            self._trail.refused(user_id, error, str(error))
            raise error

    def _require_still_open(self, context: UserExecutionContext) -> None:
        """Refuse what was closed in the middle of it, by a thread, a finalizer or a signal handler."""
        state = context._lifetime.state
        if state is not OPEN and state is not UNBOUND:
            self._registry.remove(context)
            raise context._closed_error()

    def _recorded(
        self, error: UserContextError, context: UserExecutionContext, source: str, key: Key
    ) -> UserContextError:
        """The error to raise for a context that could not live here, once it is on record."""
        if isinstance(error, CrossUserAccessError):
            return self._guard.denied(source, mention(key))
        if isinstance(
            error, ContextLimitError | ClusterUnavailableError
        ):  # nobody would ever look for the id of a visitor that was refused
            self._trail.refused(None if context.is_anonymous else context.user_id, error, str(error))
        return error

    def _bind_session(self, context: UserExecutionContext) -> None:
        """Have plugins bind the session that a context brings with it, before anybody gets to see the context."""
        if self.hooks.bind_session and context._db_session is not None and not hasattr(context, "_session_bound"):
            self.hooks.bind_session(context, context._db_session)
            context._session_bound = True

    def _record_opening(self, context: UserExecutionContext, source: str, *, is_new: bool = True) -> None:
        try:
            self._trail.opened(context, source)
            if self._egress is not None:
                self._egress.learn_data(context)
            deadline = context._lifetime.deadline
            if deadline is not None:
                self._sweeper.plan(deadline)
            if is_new and self.hooks.context_opened:
                self.hooks.context_opened(context)
        except BaseException:
            context.close("failed")  # what is not on record does not live
            raise

    # Called by contexts.

    def child_opened(self, child: UserExecutionContext, operation_name: str) -> None:
        self._trail.child_opened(child, operation_name)
        if self.hooks.context_opened:
            self.hooks.context_opened(child)

    def journal_of(self, context: UserExecutionContext) -> Journal:
        return self._trail.journal_of(context)

    def report(
        self,
        context: UserExecutionContext,
        event: str,
        outcome: str,
        reason: str | None,
        seconds: float | None,
        data: Mapping[str, object],
    ) -> None:
        self._trail.reported(context, event, outcome, reason, seconds, data)

    def bind_refused(self, context: UserExecutionContext, user_id: str) -> None:
        self._trail.denied(context, "bind", UserMention(user_id))

    def context_closing(self, context: UserExecutionContext) -> None:
        if self.telemetry.metrics is not None:
            self.telemetry.metrics.closing(context._core)
        self._closing.add(context)
        self._registry.remove(context)
        if context._lifetime.lease is not None and context._parent is None:
            self._give_back_lease(context)
        if (run := getattr(context, "_agent_run", None)) is not None:
            run.context_closes(context._lifetime.reason)
        if context._websocket_client_id is not None:
            self._hub.leave(context)
        if context._lifetime.reason in CUT_OFF and (context._parent is None or context._parent.is_open):
            try:
                self._trail.cut_off(context)
            except Exception:
                logger.exception("why %r is closed could not be recorded", context)

    def context_ended(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        self._registry.remove(context)
        if context._lifetime.lease is not None:
            self._give_back_lease(context)
        if context._websocket_client_id is not None:
            self._hub.leave(context)
        self._record_end(context, metadata)

    def context_closed(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        self._closing.discard(context)
        self._record_end(context, metadata)

    def _record_end(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        try:
            self._trail.closed(context, metadata)
        except Exception:
            # Whatever a ledger raises: the teardown is through, and the next one must not suffer.
            logger.exception("the end of %r could not be recorded", context)
        if self.hooks.context_closed:
            self.hooks.context_closed(context, context.lifetime.reason or "closed")
        if self._draining:
            self._note_idle()

    def bind_context(self, context: UserExecutionContext, user_id: str) -> None:
        self._guard.require_unbound(context)
        anonymous_id = context.user_id
        context.verify_isolation()
        displaced = self._rebind(context, user_id)
        try:
            self._close_displaced(displaced)
            if context.user_id != user_id:
                raise IdentityConflictError(
                    "the context closed, or got another identity, at the same moment; open a new one"
                )
            if self._egress is not None:
                self._egress.bound(context, anonymous_id, user_id)
            self._trail.bound(context, anonymous_id)
        finally:  # what failed after it has happened all the same, and under the old id nobody would find it again
            if context._websocket_client_id is not None:
                self._hub.move(context, anonymous_id)
        self.hooks.context_bound(context, anonymous_id)

    def _rebind(self, context: UserExecutionContext, user_id: str) -> Displaced:
        leasing = self._leasing
        if leasing is None:
            return self._registry.rebind(context, user_id, lambda: context._become(user_id))
        try:
            lease = leasing.take_now(context, user_id)
        except UserContextError as error:
            raise self._recorded(error, context, "bind", user_id) from None

        def become() -> None:
            if context._become(user_id):
                leasing.let_live(context, lease)

        try:
            return self._registry.rebind(context, user_id, become)
        finally:
            if context._lifetime.lease is not lease:
                leasing.member.release(lease)

    def end_within(self, context: UserExecutionContext, seconds: float) -> None:
        self._plan(self._registry.limit(context, seconds))

    def renew_credentials(self, context: UserExecutionContext, seconds: float | None) -> None:
        self._guard.require(context.user_id, "refresh")
        self._trail.refreshed(context)
        self._plan(self._registry.renew(context, seconds))

    def require_owner(self, user_id: str, action: str) -> None:
        self._guard.require(user_id, action)

    def new_environment(self) -> IsolatedEnvironment:
        return self.environment.overlay()

    def subkeys(self, purpose: str) -> tuple[bytes, ...]:
        """For an adapter: 32 bytes to key hashes by, under the current secret and then under each previous one.

        ``purpose`` says in words what they are for, so that no two uses share a key: printable text. Raises
        ConfigurationError in production when no secret is set.
        """
        if not purpose.isprintable() or not purpose.strip():
            raise ConfigurationError(f"purpose is {purpose!r}; say in a few printable words what the keys are for")
        self._secrets.require(purpose)
        return tuple(secret.subkey(f"adapter {purpose}") for secret in self._secrets.all)

    # Closing from outside.

    def sweep(self) -> int:
        """Close the contexts whose deadline has come, and record the denials that were counted. Returns how many were
        closed. Called by the manager's own thread.
        """
        closed = 0
        self._trail.tell_due()
        self._hub.sweep()
        if self._egress is not None:
            self._egress.table.sweep()
        while due := self._registry.take_due():
            for context in due:
                closed += 1
                try:
                    if context.lifetime.loop is not None and context.lifetime.loop is running_loop():
                        context.close("expired")
                    else:
                        close_apart(context, "expired")
                except Exception:
                    # A fault in closing one context must not keep the others open; the registry offers it again.
                    logger.exception("%r has expired and could not be closed; it is tried again", context)
                    self._registry.postpone(context)
        return closed

    def _close_displaced(self, displaced: Displaced, successor: UserExecutionContext | None = None) -> None:
        for context, reason in displaced.items():
            if successor is None or context.user_id != successor.user_id:
                close_apart(context, reason)
            else:
                context.lifetime.hand_over(successor.lifetime)
                context.close(reason)

    def record_refusal(self, error: Exception, detail: str) -> None:
        """Note that a connection was refused before it had a user, and why."""
        self._trail.refused(None, error, detail)

    async def all_written(self) -> None:
        """Wait until what is on record so far is durable. Where that cannot be, the log says how much is not."""
        ledger = self._durable_ledger
        try:
            self._trail.tell_counted()
            if ledger is not None:
                await ledger.durable()
        except LedgerUnavailableError as error:
            logger.critical("%d audit records are not written: %s", 0 if ledger is None else ledger.lag, error)

    def _note_idle(self) -> None:
        for loop, event, asking in tuple(self._drained):
            if self._is_idle_but_for(asking):
                with suppress(RuntimeError):  # that loop is closed, and whoever waited on it has gone
                    loop.call_soon_threadsafe(event.set)

    def _is_idle_but_for(self, asking: UserExecutionContext | None) -> bool:
        """Whether nothing lives here or is being released any more but who asks, in its own context."""
        is_there = asking is not None and (asking.is_open or asking in self._closing)
        return len(self._registry) + len(self._closing) == int(is_there)

    # For the parts.

    def _live(self) -> int:
        return len(self._registry)

    def _lag(self) -> int:
        return 0 if self._durable_ledger is None else self._durable_ledger.lag

    def _late(self) -> int:
        return len(self.agents.stragglers)

    def _figures(self) -> Figures | None:
        return None if self.cluster is None else self.cluster.figures()

    def _next_wake(self) -> float | None:
        forgets = None if self._egress is None else self._egress.table.next_wake()
        wakes = self._registry.next_wake(), self._trail.next_wake(), self._hub.next_wake(), forgets
        return min((wake for wake in wakes if wake is not None), default=None)

    def _plan(self, deadline: float | None) -> None:
        if deadline is not None:
            self._sweeper.plan(deadline)
