"""UserContextManager: opens, finds and closes contexts, for as long as the application lives."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from ucm_middleware.ambient import Grant
from ucm_middleware.audit.ledger import DurableLedger, Ledger, NoLedger
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import UserMention, mention
from ucm_middleware.audit.trail import CUT_OFF, AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.database import hold_transaction, require_transactions, run_in_transaction
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import (
    ConfigurationError,
    ContextExpiredError,
    ContextIsolationError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    LedgerUnavailableError,
    ManagerDrainingError,
    UserContextError,
)
from ucm_middleware.events.delivery import Delivery
from ucm_middleware.events.envelope import TO_ALL, narrowing
from ucm_middleware.events.hub import Hub
from ucm_middleware.events.policy import CONTEXT_CHANGED, EventPolicy
from ucm_middleware.execution import validate_user_context
from ucm_middleware.expiry import LONGEST_TTL, checked_ttl
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.guard import Everyone, Guard
from ucm_middleware.ids import UnifiedIDManager, checked_user_id, is_anonymous_id, validate_id
from ucm_middleware.keys import OwnerKeys
from ucm_middleware.lifetime import OPEN, UNBOUND, WEBSOCKET, CloseReason, Journal, Lifetime, loop_is_live, running_loop
from ucm_middleware.messenger import Messenger
from ucm_middleware.plugins import load_hooks
from ucm_middleware.registry import Displaced, Key, Limits, Registry
from ucm_middleware.secret import SecretRing
from ucm_middleware.sharing import Finding, find_shared
from ucm_middleware.sweeper import Sweeper
from ucm_middleware.telemetry import Telemetry
from ucm_middleware.transactions import IsolationLevel, StatementResult, checked_level

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What the walk over all live contexts found: each object that two users share, by both paths."""

    contexts: int
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        """True when nothing is shared."""
        return not self.findings


class UserContextManager:
    """The live contexts of one application. Every method may be called from any thread and inside a running loop.

    ``key`` arguments take a user's own id, any other key of theirs, or the pair (user id, request id). Whoever asks
    from inside a user's context is answered for that user only; see ``privileged``.

    ``ttl`` is the life of a context in seconds when none is given; None for no deadline. ``guard`` "open" trusts code
    outside of any context even when the manager serves a middleware. ``secret`` is what stored hashes are keyed by,
    32 random bytes or more, ``UCM_SECRET`` by default; ``previous_secrets`` are those before it, newest first,
    ``UCM_SECRET_PREVIOUS`` by default. ``clock`` is monotonic, in seconds. ``plugins`` are names of installed entry
    points, modules or objects with hooks; ``UCM_PLUGINS`` of the environment names more. Without ``telemetry`` there
    are no OpenTelemetry spans and metrics, also where an SDK is set.

    ``ledger`` is where records go, the process's memory by default. With ``audit`` "async" they are written as soon as
    may be, and what a durable ledger cannot keep up with waits. With "strict", a request's opening is durable before
    its handler runs, its outcome before the last of its answer leaves, and 503 answers what cannot be recorded. "off"
    keeps none.

    ``events`` says which events may be sent, and how many may wait. ``max_connections_per_user`` is how many of a
    user's contexts may be WebSocket connections: four fifths of them unless another number is given, so that requests
    find room.

    Raises PluginError for a plugin that cannot be served, LedgerFileError for such a ledger.
    """

    MAX_CONTEXTS_PER_USER: ClassVar[int] = 10
    MAX_CONTEXTS: ClassVar[int] = 100_000
    MAX_ANONYMOUS_CONTEXTS: ClassVar[int] = 10_000
    MANAGED_TTL: ClassVar[float] = 3600.0

    def __init__(
        self,
        *,
        max_contexts_per_user: int | None = None,
        max_contexts: int | None = None,
        max_anonymous_contexts: int | None = None,
        ttl: float | None = None,
        environment: IsolatedEnvironment | None = None,
        ledger: Ledger | None = None,
        audit: Literal["strict", "async", "off"] = "async",
        guard: Literal["closed", "open"] = "closed",
        secret: str | bytes | None = None,
        previous_secrets: Sequence[str | bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
        plugins: Sequence[object] = (),
        telemetry: bool = True,
        events: EventPolicy | None = None,
        max_connections_per_user: int | None = None,
    ) -> None:
        per_user = _checked_limit("max_contexts_per_user", max_contexts_per_user, self.MAX_CONTEXTS_PER_USER)
        limits = Limits(
            per_user,
            _checked_limit("max_contexts", max_contexts, self.MAX_CONTEXTS),
            _checked_limit("max_anonymous_contexts", max_anonymous_contexts, self.MAX_ANONYMOUS_CONTEXTS),
            _checked_connections(max_connections_per_user, per_user),
        )
        _check_audit(audit, ledger)
        if guard not in ("closed", "open"):
            raise ConfigurationError(f"guard must be 'closed' or 'open', not {guard!r}")
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise ConfigurationError(
                "this interpreter runs without the GIL, on which the table of live contexts relies; "
                "start it with PYTHON_GIL=1, or use a build that has it"
            )
        self.ttl = checked_ttl(ttl)
        self.environment = IsolatedEnvironment() if environment is None else environment
        self.ids = UnifiedIDManager()
        self._clock = clock
        self.audit = audit
        if ledger is None:
            ledger = NoLedger() if audit == "off" else MemoryLedger()
        self._durable_ledger = ledger if isinstance(ledger, DurableLedger) else None
        self._sweeper = Sweeper(self.sweep, self._next_wake, clock)
        self._trail = AuditTrail(ledger, clock, self._sweeper.plan, is_strict=audit == "strict")
        self.hooks = load_hooks(plugins, self.environment)
        self._guard = Guard(self._trail, self.hooks, is_open=guard == "open")
        self._secrets = SecretRing.from_settings(secret, previous_secrets, self.environment)
        self.keys = OwnerKeys(self._secrets, self._guard.denied)
        if self._durable_ledger is not None:
            self._durable_ledger.start(self._secrets)
        self._registry = Registry(limits, clock)
        self._hub = Hub(EventPolicy() if events is None else events, clock, self._sweeper.plan)
        self._messenger = Messenger(self._hub, self._guard, self._trail, self._registry.live_of)
        self.telemetry = Telemetry(self._trail, self._secrets, self._live, self._lag, wanted=telemetry)
        self.after_fork()
        renewed_after_fork(self)
        weakref.finalize(self, self._sweeper.stop).atexit = False
        weakref.finalize(self, self._trail.tell_counted)  # also when the interpreter ends

    def after_fork(self) -> None:
        """Begin anew in a forked child: what is under way in the parent ends there."""
        self._draining = False
        self._closing: set[UserExecutionContext] = set()
        self._drained: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def guard(self) -> Guard:
        """Who decides who may touch whose contexts."""
        return self._guard

    # The keys.

    def get_context(self, user_id: Key) -> UserExecutionContext:
        """The live context under a key.

        Raises ContextNotFoundError when there is none, ContextExpiredError when its deadline has come, and
        CrossUserAccessError, whether or not there is one, when it would be another user's.
        """
        context = self._find(user_id, "get_context")
        if context is None:
            raise ContextNotFoundError(
                "there is no live context under this key: it was never set, or was cleared or closed"
            )
        return context

    def set_context(self, user_id: Key, context: UserExecutionContext, ttl_seconds: float | None = None) -> None:
        """Put a context under a key, replacing the owner's context that was there, which is closed.

        A key that equals a user id belongs to that user, whatever stood there. A child context has no key: it is found
        through its parent, and closes with it. Raises InvalidContextError, ContextIsolationError, CrossUserAccessError
        for another's key or context, ContextLimitError, ContextClosedError.
        """
        key = self._own(_checked_key(user_id))
        ttl = checked_ttl(ttl_seconds)
        validate_user_context(context)
        self._guard.require(context.user_id, "set_context")
        if context.operation_depth:
            rule = "is a child context, which closes with its parent and is found through it, not by a key"
            raise InvalidContextError("context", rule, "give its root, or a context of its own")
        if context.verify_isolation() is not True:
            raise ContextIsolationError("the context does not vouch for its isolation")
        self._register(context, key, ttl)

    def clear_context(self, user_id: Key) -> bool:
        """Close the context under a key. True when there was one.

        Asynchronous resources are released on the loop that they were opened on, after this returns; see
        ``cleanup_context``. What a resource raises is logged and recorded.
        """
        context = self._find(user_id, "clear_context", missing_is_fine=True)
        if context is None:
            return False
        context.close("cleared")
        return True

    async def cleanup_context(self, user_id: Key) -> bool:
        """Close the context under a key and wait until its resources are released. True when there was one."""
        context = self._find(user_id, "cleanup_context", missing_is_fine=True)
        if context is None:
            return False
        await context.aclose("cleared")
        return True

    def require_secret(self, feature: str) -> None:
        """For an adapter, at its start: raise ConfigurationError in production when no secret is set.

        Elsewhere one was made for this process, of which a warning tells once. ``feature`` names, in the plural, what
        the secret is for.
        """
        self._secrets.require(feature)

    def subkeys(self, purpose: str) -> tuple[bytes, ...]:
        """For an adapter: 32 bytes to key hashes by, under the current secret and then under each previous one.

        ``purpose`` says in words what they are for, so that no two uses share a key: printable text. Raises
        ConfigurationError in production when no secret is set.
        """
        if not purpose.isprintable() or not purpose.strip():
            raise ConfigurationError(f"purpose is {purpose!r}; say in a few printable words what the keys are for")
        self._secrets.require(purpose)
        return tuple(secret.subkey(f"adapter {purpose}") for secret in self._secrets.all)

    # Making contexts.

    def create_isolated_context(
        self,
        user_id: str,
        request_id: str | None = None,
        *,
        thread_id: str | None = None,
        run_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
        ttl_seconds: float | None = None,
    ) -> UserExecutionContext:
        """A new context, live under the pair (user_id, request_id), with ids made for those not given.

        Raises what ``set_context`` raises.
        """
        ttl = checked_ttl(ttl_seconds)
        user_id = validate_id(user_id, "user_id")
        self._guard.require(user_id, "create_context")
        if request_id is None and thread_id is None and run_id is None:
            context = UserExecutionContext._with_own_ids(
                user_id, self.ids.generate_core(), db_session, websocket_client_id, agent_context, audit_metadata
            )
        else:
            thread_id = self.ids.generate_thread_id() if thread_id is None else thread_id
            context = UserExecutionContext(
                user_id=user_id,
                thread_id=thread_id,
                run_id=self.ids.generate_run_id(thread_id) if run_id is None else run_id,
                request_id=self.ids.generate_request_id() if request_id is None else request_id,
                db_session=db_session,
                websocket_client_id=websocket_client_id,
                agent_context=agent_context,
                audit_metadata=audit_metadata,
            )
        try:
            context.verify_isolation()
            if self._draining:
                self._refuse_while_draining(user_id)
            context._host = self
            self._bind_session(context)
            self._admit(context, self.ttl if ttl is None else ttl, "create_context")
        except BaseException:
            context._give_back()
            raise
        self._record_opening(context, "create_context")
        return context

    def create_managed_context(
        self,
        user_id: str,
        request_id: str | None = None,
        *,
        thread_id: str | None = None,
        run_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
        ttl_seconds: float | None = None,
    ) -> UserExecutionContext:
        """The same, with a deadline in any case: an hour when neither this call nor the manager names one."""
        return self.create_isolated_context(
            user_id,
            request_id,
            thread_id=thread_id,
            run_id=run_id,
            db_session=db_session,
            websocket_client_id=websocket_client_id,
            agent_context=agent_context,
            audit_metadata=audit_metadata,
            ttl_seconds=ttl_seconds if ttl_seconds is not None else self.ttl or self.MANAGED_TTL,
        )

    def create_context_with_unified_ids(self, user_id: str) -> UserExecutionContext:
        """The same, with all ids made by ``UnifiedIDManager``: its run id names its thread id."""
        return self.create_isolated_context(user_id)

    # Transactions.

    def create_context_with_transaction(
        self, user_id: str, *, isolation_level: IsolationLevel | None = None, ttl_seconds: float | None = None
    ) -> UserExecutionContext:
        """A new context whose ``db_session`` works in one transaction, which a plugin opens and ties to the user.

        It is committed when the context closes well, and rolled back after anything else. Run the work in
        ``managed_user_context(context)``, which raises when the commit fails; a commit that fails when the context is
        cleared is logged and recorded. Nothing is asked of the database before the first statement.

        Raises ConfigurationError where no plugin opens transactions and for another isolation level, and what
        ``set_context`` raises.
        """
        level = checked_level(isolation_level)
        require_transactions(self.hooks.open_transaction)
        context = self.create_isolated_context(user_id, ttl_seconds=ttl_seconds)
        try:
            transaction = hold_transaction(context, self.hooks.open_transaction, level)
            context._db_session = context.own(transaction.session, name="db_session")
        except BaseException as error:
            context.close("failed", error)
            raise
        return context

    async def execute_in_transaction(
        self,
        user_id: str,
        statement: object,
        parameters: object = None,
        *,
        isolation_level: IsolationLevel | None = None,
    ) -> StatementResult:
        """Run one statement as a user, in a transaction of its own: committed when this returns, else rolled back.

        ``statement`` and ``parameters`` are what the plugin's framework takes. In that user's own context it runs in a
        child of it. Raises what the database raises, CrossUserAccessError for code of another user, and as
        ``create_context_with_transaction`` does.
        """
        level = checked_level(isolation_level)
        require_transactions(self.hooks.open_transaction)
        user_id = checked_user_id(user_id)
        acting = self._guard.acting()
        if acting is not None and acting.user_id == user_id:
            context = acting.create_child_context("execute_in_transaction")
        else:
            context = self.create_isolated_context(user_id)
        return await run_in_transaction(context, self.hooks.open_transaction, statement, parameters, level)

    def _open_for_connection(
        self, user_id: str | None, ttl: float | None, variables: Context | None, websocket: bool
    ) -> UserExecutionContext:
        """A context for a request or connection; anonymous without a user. For the middleware, which has checked
        the id.
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

    # Events.

    async def send_event(
        self,
        user_id: str,
        event: str,
        data: object = None,
        *,
        thread_id: str | None = None,
        run_id: str | None = None,
        connection_id: str | None = None,
    ) -> Delivery:
        """Send an event to every live connection of a user, in the order of all events for that user.

        ``data`` is what JSON has. Each of the others narrows it to the user's connections of that thread or run, or to
        the one with that ``websocket_client_id``. A slow connection delays nobody else; see ``EventPolicy``.

        Raises InvalidEventError when nothing was sent, since the type or the data breaks a rule or the user was never
        here, and CrossUserAccessError for code of another user.
        """
        return await self._messenger.send(user_id, event, data, narrowing(thread_id, run_id, connection_id))

    def post_event(
        self,
        user_id: str,
        event: str,
        data: object = None,
        *,
        thread_id: str | None = None,
        run_id: str | None = None,
        connection_id: str | None = None,
    ) -> Delivery:
        """The same from synchronous code, in any thread. What is answered is then often still queued.

        Raises ConfigurationError on an event loop under the policy "wait", which would block it.
        """
        return self._messenger.post(user_id, event, data, narrowing(thread_id, run_id, connection_id))

    async def notify_context_change(self, user_id: str, change: Mapping[str, object]) -> Delivery:
        """Tell every live connection of a user that something about the user changed: a "context_changed" event."""
        return await self._messenger.send(user_id, CONTEXT_CHANGED, change, TO_ALL)

    def follow(self, context: UserExecutionContext, *ids: str) -> None:
        """Send the connection of a context the events of these threads and runs too, of the same user.

        It has those of its own thread and run in any case. Follow before the connection is accepted: what is replayed
        to it then has those events too. Raises ContextNotFoundError for a context without a live connection,
        InvalidContextError for a bad id, and for more than a hundred.
        """
        self._guard.require(context.user_id, "follow")
        self._hub.follow(context._root, *(validate_id(one, "ids") for one in ids))

    def revoke(self, user_id: str, reason: str) -> int:
        """Sign a user out: close every live context, and forget the events that were kept. Returns how many there were.

        WebSockets are closed with 1008, running requests cancelled and answered with 401, resources released after
        that. The handler that calls this for its own user is not cancelled: a request may still answer, a connection
        ends with the next thing that it sends or receives. ``reason`` goes into the audit trail. Whoever still has
        valid credentials may come back: end those first.

        Raises CrossUserAccessError for code of another user, InvalidContextError for an empty reason.
        """
        user_id = checked_user_id(user_id)
        self._guard.require(user_id, "revoke")
        actor = self._guard.acting_user()
        if not reason.strip():
            raise InvalidContextError("reason", "is empty", "say why; it goes into the audit trail")
        contexts = [context for _, context in self._registry.live_of([user_id])]
        try:
            self._trail.user_revoked(actor, user_id, reason, len(contexts))
        except Exception:  # nobody stays signed in because a disk is full
            logger.critical(
                "that %d contexts of a user are revoked could not be recorded", len(contexts), exc_info=True
            )
        self._hub.purge(user_id)
        for context in contexts:
            try:
                context.close("revoked")
            except Exception:  # no more threads, say: the others must not stay signed in for that
                logger.exception("%r is revoked, and its closing failed", context)
        self._hub.purge(user_id)  # and what was sent while they closed
        return len(contexts)

    # What is there.

    def get_active_contexts(self) -> dict[Key, dict[str, Any]]:
        """Each live context by a key of its own, as plain values without secrets. From inside a context, that
        user's only."""
        users = self._guard.visible_users("get_active_contexts")
        shown = self._registry.live() if users is None else self._registry.live_of(users)
        # One that a thread is just closing may still stand in the table.
        live = ((key, context) for key, context in shown if context.is_open and not context.lifetime.is_expired)
        return {key: self._describe(context) for key, context in live}

    def validate_isolation(self) -> bool:
        """True when no two users' live contexts share a mutable object. What they share, ``isolation_report`` names."""
        return bool(self.isolation_report())

    def isolation_report(self) -> IsolationReport:
        """Walk the containers, attributes and sessions of all live contexts, and name what two users share, by path."""
        self._guard.require_everyone("validate_isolation")
        contexts = [context for _, context in self._registry.live()]
        findings = tuple(find_shared(root for context in contexts for root in context.isolation_roots()))
        if findings:
            self._trail.isolation_violated(findings)
        return IsolationReport(len(contexts), findings)

    def get_audit_trail(self, user_id: str) -> dict[str, Any] | None:
        """What is on record for one user, before and after their contexts closed; None for a user never seen."""
        user_id = checked_user_id(user_id)
        self._guard.require(user_id, "get_audit_trail")
        return self._trail.of(user_id)

    def get_system_trail(self) -> list[dict[str, Any]]:
        """What stands in no user's trail: connections refused before they had a user, what trusted code was granted or
        denied, and breaches of isolation.
        """
        self._guard.require_everyone("get_system_trail")
        return self._trail.of_system()

    def is_healthy(self) -> bool:
        """True while new contexts are opened, and their records can be kept."""
        return not self._draining and (self._durable_ledger is None or self._durable_ledger.problem is None)

    def privileged(
        self, *, reason: str, users: Collection[str] | Literal[Everyone.EVERYONE]
    ) -> AbstractContextManager[Grant]:
        """``with manager.privileged(reason=..., users=[...]):`` may touch those users' contexts. Recorded at its
        start.
        """
        return self._guard.privileged(reason, users)

    # The end.

    def cleanup_all_contexts(self) -> int:
        """Close every live context. Returns how many there were."""
        self._guard.require_everyone("cleanup_all_contexts")
        contexts = [context for _, context in self._registry.live()]
        for context in contexts:
            context.close("cleared")
        return len(contexts)

    def serve(self) -> None:
        """Open contexts, from now on for a middleware: code outside of any context is no longer trusted."""
        self._guard.serve()
        self._draining = False
        self.telemetry.look()

    async def drain(self, timeout: float) -> int:
        """Open no more contexts, give the live ones so many seconds to end, then close them, interrupting their
        handlers.

        Returns how many were closed. The middleware calls it at the lifespan's shutdown, which uvicorn, hypercorn and
        granian announce only after the last request has ended or their own graceful timeout has. To refuse new requests
        with 503 and end the open ones before that, call it from the hook that precedes the server's stop.
        """
        timeout = checked_drain_timeout(timeout)
        self._draining = True
        idle = asyncio.Event()
        self._drained.append((asyncio.get_running_loop(), idle))
        self._note_idle()
        try:
            await asyncio.wait_for(idle.wait(), timeout)
        except TimeoutError:
            logger.warning(
                "%d contexts are still open after %g seconds of draining: closing them", len(self._registry), timeout
            )
        contexts = [context for _, context in self._registry.live()]
        await asyncio.gather(*(context.aclose("shutdown") for context in (*contexts, *self._closing)))
        await self.all_written()
        return len(contexts)

    def sweep(self) -> int:
        """Close the contexts whose deadline has come, and record the denials that were counted. Returns how many were
        closed. Called by the manager's own thread.
        """
        closed = 0
        self._trail.tell_due()
        self._hub.sweep()
        while due := self._registry.take_due():
            for context in due:
                closed += 1
                try:
                    if context.lifetime.loop is not None and context.lifetime.loop is running_loop():
                        context.close("expired")
                    else:
                        self._close_apart(context, "expired")
                except Exception:
                    # A fault in closing one context must not keep the others open; the registry offers it again.
                    logger.exception("%r has expired and could not be closed; it is tried again", context)
                    self._registry.postpone(context)
        return closed

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
        if context._websocket_client_id is not None:
            self._hub.leave(context)
        if context._lifetime.reason in CUT_OFF and (context._parent is None or context._parent.is_open):
            try:
                self._trail.cut_off(context)
            except Exception:
                logger.exception("why %r is closed could not be recorded", context)

    def context_ended(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        self._registry.remove(context)
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
        displaced = self._registry.rebind(context, user_id, lambda: context._become(user_id))
        try:
            self._close_displaced(displaced)
            if context.user_id != user_id:
                raise IdentityConflictError(
                    "the context closed, or got another identity, at the same moment; open a new one"
                )
            self._trail.bound(context, anonymous_id)
        finally:  # what failed after it has happened all the same, and under the old id nobody would find it again
            if context._websocket_client_id is not None:
                self._hub.move(context, anonymous_id)
        self.hooks.context_bound(context, anonymous_id)

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

    # Inside.

    def _find(self, key: Key, action: str, *, missing_is_fine: bool = False) -> UserExecutionContext | None:
        """The live context under a key, None when there is none. Foreign and missing take the same way out."""
        asked = _checked_key(key)
        key = self._own(asked)
        context = self._registry.lookup(key)
        if context is not None and self._guard.admits(context.user_id):
            if not context.lifetime.is_expired:
                return context
            self._close_apart(context, "expired")
            if missing_is_fine:
                return None
            raise ContextExpiredError("the context under this key reached its deadline")
        if asked != key:  # a key in the asker's own name that is not there: it could have been meant for anybody
            raise self._guard.denied(action, mention(asked))
        self._guard.require(key if isinstance(key, str) else key[0], action, mention(asked))
        return None

    def _own(self, key: Key) -> Key:
        """In a user's context a text key other than the own id means the pair (own id, text).

        So it can neither collide with another user's key, nor occupy it, nor tell whether it is there.
        """
        user_id = self._guard.acting_user()
        if user_id is None or not isinstance(key, str) or key == user_id:
            return key
        return key if self._guard.is_granted(key) else (user_id, key)

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
        try:
            # So that the user too finds it by this text: from inside, it means the pair.
            also = (context.user_id, key) if isinstance(key, str) and key != context.user_id else None
            displaced.update(self._registry.insert(context, key, ttl, self.ttl, also))
            self._require_still_open(context)
        except UserContextError as error:
            self._close_displaced(displaced)
            if not was_here:
                context._detach()
            raise self._recorded(error, context, "set_context", key) from None
        self._close_displaced(displaced, context)
        self._record_opening(context, "set_context", is_new=not was_here)

    def _admit(self, context: UserExecutionContext, ttl: float | None, source: str) -> None:
        """Let a new context live here, under the pair of its user and its request."""
        try:
            displaced = self._registry.admit(context, ttl)
        except UserContextError as error:
            raise self._not_admitted(error, context, source) from None
        if displaced is not None:
            self._make_way(displaced, context, source)

    def _not_admitted(self, error: UserContextError, context: UserExecutionContext, source: str) -> UserContextError:
        context._detach()
        return self._recorded(error, context, source, (context.user_id, context.request_id))

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
        if isinstance(error, ContextLimitError):  # nobody would ever look for the id of a visitor that was refused
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
            deadline = context._lifetime.deadline
            if deadline is not None:
                self._sweeper.plan(deadline)
            if is_new and self.hooks.context_opened:
                self.hooks.context_opened(context)
        except BaseException:
            context.close("failed")  # what is not on record does not live
            raise

    def _close_displaced(self, displaced: Displaced, successor: UserExecutionContext | None = None) -> None:
        for context, reason in displaced.items():
            if successor is None or context.user_id != successor.user_id:
                self._close_apart(context, reason)
            else:
                context.lifetime.hand_over(successor.lifetime)
                context.close(reason)

    def _close_apart(self, context: UserExecutionContext, reason: CloseReason) -> None:
        """Close another's context without doing its releases here: they may be slow, and are nothing of the asker's."""
        loop = context.lifetime.loop
        if not context.needs_waiting:
            context.close(reason)
            return
        if loop is not None and loop_is_live(loop):
            with suppress(RuntimeError):  # the loop was closed in this very moment
                loop.call_soon_threadsafe(context.close, reason, context=Context())
                return
        threading.Thread(target=context.close, args=(reason,), name="ucm-middleware release", daemon=True).start()

    def _live(self) -> int:
        return len(self._registry)

    def _lag(self) -> int:
        return 0 if self._durable_ledger is None else self._durable_ledger.lag

    def _next_wake(self) -> float | None:
        wakes = self._registry.next_wake(), self._trail.next_wake(), self._hub.next_wake()
        return min((wake for wake in wakes if wake is not None), default=None)

    def _plan(self, deadline: float | None) -> None:
        if deadline is not None:
            self._sweeper.plan(deadline)

    def _note_idle(self) -> None:
        if len(self._registry) or self._closing:
            return
        for loop, event in self._drained:
            with suppress(RuntimeError):  # that loop is closed, and whoever waited on it has gone
                loop.call_soon_threadsafe(event.set)
        self._drained.clear()

    def _describe(self, context: UserExecutionContext) -> dict[str, Any]:
        deadline = context.lifetime.deadline
        return {
            "user_id": context.user_id,
            "thread_id": context.thread_id,
            "run_id": context.run_id,
            "request_id": context.request_id,
            "websocket_client_id": context.websocket_client_id,
            "created_at": context.created_at.isoformat(),
            "age_seconds": context.age_seconds,
            "expires_in_seconds": None if deadline is None else deadline - self._clock(),
            "is_anonymous": context.is_anonymous,
        }


def _checked_key(key: object) -> Key:
    if isinstance(key, tuple):
        pair = cast("tuple[object, ...]", key)
        if len(pair) != 2:
            raise InvalidContextError("key", "is a tuple of another length than two", "give (user_id, request_id)")
        return checked_user_id(pair[0]), validate_id(pair[1], "request_id")
    return str.__str__(key) if is_anonymous_id(key) else validate_id(key, "key")


def _check_audit(audit: object, ledger: Ledger | None) -> None:
    if audit not in ("strict", "async", "off"):
        raise ConfigurationError(f"audit must be 'strict', 'async' or 'off', not {audit!r}")
    if audit == "off" and ledger is not None:
        raise ConfigurationError("audit is 'off', and a ledger is given; leave one of the two out")
    if audit == "strict" and not isinstance(ledger, DurableLedger):
        raise ConfigurationError(
            "audit is 'strict', which needs a ledger that keeps records for good: "
            "ledger=SQLiteLedger('audit.db', keys='audit-keys.db')"
        )


def _checked_limit(name: str, limit: object, default: int) -> int:
    if limit is None:
        return default
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {limit!r}")
    return limit


def _checked_connections(connections: int | None, contexts: int) -> int:
    limit = _checked_limit("max_connections_per_user", connections, max(1, contexts * 4 // 5))
    if limit > contexts:
        raise ConfigurationError(
            f"max_connections_per_user is {limit}, and a user may have {contexts} contexts in all, each connection one "
            "of them; raise max_contexts_per_user too"
        )
    return limit


def checked_drain_timeout(timeout: object) -> float:
    """Seconds as a float. Raises ConfigurationError for what is no finite number of at least 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout <= LONGEST_TTL:
        raise ConfigurationError(f"drain_timeout must be a number of seconds of at least 0, not {timeout!r}")
    return float(timeout)
