"""UserContextManager: the interface. It opens, finds and closes contexts, for as long as the application lives."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar, Literal, cast

from ucm_middleware.agents.catalog import AgentFactory
from ucm_middleware.agents.policy import AgentPolicy
from ucm_middleware.agents.stragglers import Straggler
from ucm_middleware.agents.stream import AgentStream
from ucm_middleware.ambient import Grant
from ucm_middleware.audit.ledger import Ledger
from ucm_middleware.audit.records import mention
from ucm_middleware.census.policy import CensusPolicy
from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.views import live_in_cluster
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.database import hold_transaction, require_transactions, run_in_transaction
from ucm_middleware.egress.policy import EgressPolicy
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import (
    ConfigurationError,
    ContextExpiredError,
    ContextIsolationError,
    ContextNotFoundError,
    InvalidContextError,
)
from ucm_middleware.events.delivery import Delivery
from ucm_middleware.events.envelope import TO_ALL, narrowing
from ucm_middleware.events.policy import CONTEXT_CHANGED, EventPolicy
from ucm_middleware.execution import validate_user_context
from ucm_middleware.expiry import checked_ttl
from ucm_middleware.guard import Everyone
from ucm_middleware.health import Health
from ucm_middleware.hosting import Hosting
from ucm_middleware.ids import checked_user_id, is_anonymous_id, validate_id
from ucm_middleware.messenger import Messenger
from ucm_middleware.reachability import IsolationPolicy, IsolationReport
from ucm_middleware.reachability.policy import MAX_OBJECTS, MAX_SECONDS
from ucm_middleware.registry import Key, Limits
from ucm_middleware.settings import (
    check_audit,
    checked_connections,
    checked_drain_timeout,
    checked_guard,
    checked_limit,
    require_function,
    require_gil,
    require_kind,
)
from ucm_middleware.teardown import close_apart
from ucm_middleware.transactions import IsolationLevel, StatementResult, checked_level

logger = logging.getLogger(__name__)


class UserContextManager(Hosting):
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
    find room. ``agents`` says how many runs of agents a user may have at once, and for how long. ``isolation`` says
    what users share by design, and how often a context's data are compared with those of others when it closes.
    ``census`` says what is done about that which outlives its request. With ``egress``, values that a user protects are
    looked for in what is sent to any other; None for no such guard. ``cluster`` makes this worker one of many that
    share their users, by the URL of a store or a ``ClusterPolicy``; ``UCM_CLUSTER_URL`` by default, and without that it
    stands alone.

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
        agents: AgentPolicy | None = None,
        egress: EgressPolicy | None = None,
        isolation: IsolationPolicy | None = None,
        census: CensusPolicy | None = None,
        cluster: ClusterPolicy | str | None = None,
    ) -> None:
        per_user = checked_limit("max_contexts_per_user", max_contexts_per_user, self.MAX_CONTEXTS_PER_USER)
        limits = Limits(
            per_user,
            checked_limit("max_contexts", max_contexts, self.MAX_CONTEXTS),
            checked_limit("max_anonymous_contexts", max_anonymous_contexts, self.MAX_ANONYMOUS_CONTEXTS),
            checked_connections(max_connections_per_user, per_user),
        )
        require_kind("ledger", ledger, Ledger, "SQLiteLedger('audit.db', keys='audit-keys.db')")
        require_kind("environment", environment, IsolatedEnvironment, "IsolatedEnvironment('.env')")
        require_kind("events", events, EventPolicy, "EventPolicy(types=['order_shipped'])")
        require_kind("agents", agents, AgentPolicy, "AgentPolicy(timeout=60)")
        require_kind("egress", egress, EgressPolicy, "EgressPolicy(fields=['access_token'])")
        require_kind("isolation", isolation, IsolationPolicy, "IsolationPolicy(shared_types=[Pool])")
        require_kind("census", census, CensusPolicy, "CensusPolicy('warn')")
        require_function("clock", clock, "time.monotonic")
        check_audit(audit, ledger)
        require_gil()
        super().__init__(
            limits,
            ttl=ttl,
            environment=IsolatedEnvironment() if environment is None else environment,
            ledger=ledger,
            audit=audit,
            is_open=checked_guard(guard) == "open",
            secret=secret,
            previous_secrets=previous_secrets,
            clock=clock,
            plugins=plugins,
            telemetry=telemetry,
            events=EventPolicy() if events is None else events,
            agents=AgentPolicy() if agents is None else agents,
            egress=egress,
            isolation=IsolationPolicy() if isolation is None else isolation,
            census=CensusPolicy() if census is None else census,
            cluster=cluster,
        )
        self._messenger = Messenger(self._hub, self._guard, self._trail, self._registry.live_of)

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

        With a cluster, the other workers close theirs under this key too, which must be a user's id, or a pair that
        begins with it, where the context is not here. True also when one of them has a context of the user. It waits
        for the store, and raises ClusterUnavailableError as ``revoke`` does.
        """
        context = self._find(user_id, "clear_context", missing_is_fine=True)
        owned = None if self._revocation.notices is None else self._owned(context, user_id)
        if context is not None:
            context.close("cleared")
        told = owned is not None and self._revocation.clear_elsewhere(*owned)
        return context is not None or told

    async def cleanup_context(self, user_id: Key) -> bool:
        """The same, and wait until its resources are released; the other workers are not waited for."""
        context = self._find(user_id, "cleanup_context", missing_is_fine=True)
        owned = None if self._revocation.notices is None else self._owned(context, user_id)
        if context is not None:
            await context.aclose("cleared")
        told = owned is not None and await self._revocation.clear_elsewhere_soon(*owned)
        return context is not None or told

    def require_secret(self, feature: str) -> None:
        """For an adapter, at its start: raise ConfigurationError in production when no secret is set.

        Elsewhere one was made for this process, of which a warning tells once. ``feature`` names, in the plural, what
        the secret is for.
        """
        self._secrets.require(feature)

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
            self._give_back_lease(context)
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

    # Agents.

    def register_agent(
        self, name: str, factory: AgentFactory, *, stateless: bool = False, timeout: float | None = None
    ) -> None:
        """Let an agent be run by a name. ``factory`` makes one for each run, from the run's own context, and may be
        async.

        What it returns is run by the plugin of its framework; without one it is an async function of the parameters.
        An agent that keeps nothing of a run may be the same one each time: say so with ``stateless``. ``timeout`` is
        the time that a run has, in seconds; that of the ``AgentPolicy`` by default.

        Raises ConfigurationError for a name that is taken or bad, and for what is no factory.
        """
        self._catalog.register(name, factory, stateless=stateless, timeout=timeout)

    async def execute_with_agent(
        self,
        user_id: str,
        agent_name: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Run an agent as a user, and return what it comes to.

        It runs in a task and a context of its own, a child of the context that asks where that is the same user's. Its
        connections are told as it goes, and so is the trail. ``parameters`` are copied. In a run, this is a sub-agent.
        Whoever is cancelled here cancels the run, and waits for its end.

        Raises what the agent raises, AgentError and its kinds for an agent that cannot be run, of which
        AgentTimeoutError at the deadline; ContextLimitError, CrossUserAccessError, and what ``set_context`` raises.
        """
        launch = self._launcher.start(user_id, agent_name, parameters, timeout, None, self.create_isolated_context)
        return await launch.outcome()

    def stream_with_agent(
        self,
        user_id: str,
        agent_name: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> AgentStream:
        """The same as a stream: ``async with manager.stream_with_agent(...) as stream: async for item in stream: ...``.

        The run begins with the block; see ``AgentStream``. Entering and iterating raise as ``execute_with_agent`` does.
        """
        launcher = self._launcher
        return AgentStream(
            user_id,
            launcher.new_channel(),
            lambda channel: launcher.start(
                user_id, agent_name, parameters, timeout, channel, self.create_isolated_context
            ),
            self._guard.require,
        )

    def get_stragglers(self) -> list[Straggler]:
        """The threads of tools, and the agents, that have outlived their run and could not be stopped, until they end.
        From inside a context, that user's only.
        """
        users = self._guard.visible_users("get_stragglers")
        return [one for one in self.agents.stragglers.listed() if users is None or one.user_id in users]

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
        """Sign a user out: close every live context, and forget the events that were kept. Returns how many there were,
        with a cluster on all workers.

        WebSockets are closed with 1008, running requests cancelled and answered with 401, resources released after
        that. A request that calls this for its own user, in any of its tasks or threads, is not cancelled: it may still
        answer. Nor is the handler of a connection that calls it itself: it ends with the next thing that it sends or
        receives. ``reason`` goes into the audit trail. Whoever still has valid credentials may come back: end those
        first.

        Raises CrossUserAccessError for code of another user, InvalidContextError for an empty reason. With a cluster it
        waits for the store, and raises ClusterUnavailableError where that could not be asked: then all that is here is
        closed, and the other workers are told as soon as they can be.
        """
        user_id = checked_user_id(user_id)
        self._guard.require(user_id, "revoke")
        actor = self._guard.acting_user()
        if not reason.strip():
            raise InvalidContextError("reason", "is empty", "say why; it goes into the audit trail")
        return self._revocation.revoke(actor, user_id, reason)

    # What is there.

    def get_active_contexts(self, *, cluster: bool = False) -> dict[Key, dict[str, Any]]:
        """Each live context by a key of its own, as plain values without secrets. From inside a context, that
        user's only.

        With ``cluster``, each live context of these users on all workers, by user and lease: the store knows no names,
        so from outside of any context it is asked for the users who have a context here. It waits for the store, and
        raises ClusterUnavailableError where that cannot be asked, ConfigurationError without one.
        """
        users = self._guard.visible_users("get_active_contexts")
        if cluster:
            return self._active_in_cluster(users)
        shown = self._registry.live() if users is None else self._registry.live_of(users)
        # One that a thread is just closing may still stand in the table.
        live = ((key, context) for key, context in shown if context.is_open and context.lifetime.permits_use)
        return {key: self._describe(context) for key, context in live}

    def validate_isolation(self) -> bool:
        """True when no two users' live contexts share a mutable object. What they share, ``isolation_report`` names.

        Also False when the time and the objects that it has do not suffice to look at all of them.
        """
        return bool(self.isolation_report())

    def isolation_report(
        self, *, max_seconds: float | None = MAX_SECONDS, max_objects: int | None = MAX_OBJECTS
    ) -> IsolationReport:
        """Walk what is reachable from all live contexts, and name what two users share, by path.

        It takes so many seconds, and looks at so many objects, at most; None for no limit. Other threads run meanwhile.
        Raises ConfigurationError for a limit that is no number above 0, CrossUserAccessError in a user's context.
        """
        self._guard.require_everyone("validate_isolation")
        return self._inspector.look(max_seconds, max_objects)

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
        return self.health().is_healthy

    def health(self) -> Health:
        """The same with what it comes from."""
        problem = None if self._durable_ledger is None else self._durable_ledger.problem
        figures = self._figures()
        state = None if figures is None else figures.state
        is_open = state not in ("down", "recovering", "full") or (self.cluster is not None and self.cluster.is_local)
        is_healthy = not self._draining and problem is None and is_open
        return Health(is_healthy, self._draining, problem, state, None if figures is None else figures.silent)

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
        with 503 and end the open ones before that, call it from the hook that precedes the server's stop. Where that
        hook is a request, it is left to end by itself, with its answer; a cluster is then left at the shutdown.
        """
        timeout = checked_drain_timeout(timeout)
        self._draining = True
        asking = self._asking()
        idle = asyncio.Event()
        waiting = (asyncio.get_running_loop(), idle, asking)
        self._drained.append(waiting)
        self._note_idle()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):  # no task more, which would be this context's
                    await idle.wait()
        finally:
            self._drained.remove(waiting)
        contexts = [context for _, context in self._registry.live() if context is not asking]
        closing = [context for context in self._closing if context is not asking]
        if contexts:
            logger.warning(
                "%d contexts are still open after %g seconds of draining: closing them", len(contexts), timeout
            )
        await asyncio.gather(*(context.aclose("shutdown") for context in (*contexts, *closing)))
        await self.all_written()
        if self.cluster is not None and asking is None:
            await self.cluster.stop()
        return len(contexts)

    # Inside.

    def _asking(self) -> UserExecutionContext | None:
        """The root of the context that this code runs in, if it lives here."""
        context = ambient_context()
        root = None if context is None else context._root
        return root if root is not None and root.host is self else None

    def _active_in_cluster(self, users: Collection[str] | None) -> dict[Key, dict[str, Any]]:
        if self.cluster is None:
            raise ConfigurationError(
                "there is no cluster to ask: give UserContextManager(cluster=...) a URL, or set UCM_CLUSTER_URL"
            )
        if users is None:
            live = (context for _, context in self._registry.live())
            users = dict.fromkeys(context.user_id for context in live if not context.is_anonymous)
        return live_in_cluster(self.cluster, users)

    def _find(self, key: Key, action: str, *, missing_is_fine: bool = False) -> UserExecutionContext | None:
        """The live context under a key, None when there is none. Foreign and missing take the same way out."""
        asked = _checked_key(key)
        key = self._own(asked)
        context = self._registry.lookup(key)
        if context is not None and self._guard.admits(context.user_id):
            if not context.lifetime.is_expired:
                return context
            close_apart(context, "expired")
            if missing_is_fine:
                return None
            raise ContextExpiredError("the context under this key reached its deadline")
        if asked != key:  # a key in the asker's own name that is not there: it could have been meant for anybody
            raise self._guard.denied(action, mention(asked))
        self._guard.require(key if isinstance(key, str) else key[0], action, mention(asked))
        return None

    def _owned(self, context: UserExecutionContext | None, key: Key) -> tuple[str, Key]:
        """Whose a key is, by the context that was under it, or by itself; and the key as it is for everybody."""
        key = self._own(_checked_key(key))
        if context is not None:
            return context._user_id, key
        return key if isinstance(key, str) else key[0], key

    def _own(self, key: Key) -> Key:
        """In a user's context a text key other than the own id means the pair (own id, text).

        So it can neither collide with another user's key, nor occupy it, nor tell whether it is there.
        """
        user_id = self._guard.acting_user()
        if user_id is None or not isinstance(key, str) or key == user_id:
            return key
        return key if self._guard.is_granted(key) else (user_id, key)

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
            rule = "is a tuple of another length than two"
            raise InvalidContextError("key", rule, "give (user_id, request_id)", is_wrong_type=True)
        return checked_user_id(pair[0]), validate_id(pair[1], "request_id")
    return str.__str__(key) if is_anonymous_id(key) else validate_id(key, "key")
