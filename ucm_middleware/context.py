"""UserExecutionContext: who a request or connection runs for, their data, and what must be released after."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol, Self, TypeVar

from ucm_middleware.callsite import caller
from ucm_middleware.current import Release
from ucm_middleware.dispatch import Wrapping
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import (
    ConfigurationError,
    ContextIsolationError,
    ContextLimitError,
    IdentityConflictError,
    InvalidContextError,
)
from ucm_middleware.handles import lend, own
from ucm_middleware.holder import ResourceHolder
from ucm_middleware.host import ContextHost
from ucm_middleware.ids import (
    MAX_LENGTH,
    Core,
    UnifiedIDManager,
    core_text,
    run_id_of,
    thread_id_of,
    validate_id,
)
from ucm_middleware.isolation import copy_data
from ucm_middleware.keys import OwnerKeys, checked_names
from ucm_middleware.lifetime import CLOSED, CLOSING, OPEN, UNBOUND, CloseReason, Lifetime
from ucm_middleware.ownership import Ownership
from ucm_middleware.principal import Principal
from ucm_middleware.reachability import Boundary, Root, find_shared
from ucm_middleware.resources import DEFAULT_RELEASE_TIMEOUT, Resource, closing_resource, name_of
from ucm_middleware.strays import Strays

if TYPE_CHECKING:
    from ucm_middleware.agents.run import AgentRun
    from ucm_middleware.egress.exchange import Exchange

T = TypeVar("T")

MAX_DEPTH: Final = 10
"""How deep children may nest below a root context."""

_ROOT: Final = (0, None)


class Connection(Protocol):
    """What is needed of Starlette's HTTPConnection."""

    @property
    def scope(self) -> Any: ...


class UserExecutionContext(ResourceHolder, Boundary):
    """One user's execution: immutable identity, data of its own, and resources that it releases when it closes.

    Made by the middleware and the manager; by hand with the constructor or ``from_request``. ``agent_context`` and
    ``audit_metadata`` are copied in, so that nothing given to two contexts is shared by them; ``db_session`` is never
    copied, and is closed with the context that it was given to.

    Raises InvalidContextError when an id or the data breaks a rule.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_agent_context",
        "_agent_run",
        "_anonymous",
        "_audit_metadata",
        "_core",
        "_created",
        "_db_session",
        "_environment",
        "_exchange",
        "_handles",
        "_host",
        "_lineage",
        "_request_id",
        "_run_id",
        "_session_bound",
        "_thread_id",
        "_user_id",
        "_websocket_client_id",
        "registry_keys",
    )

    _agent_run: "AgentRun | None"  # there where the context is that of a run, and None when that is over
    _core: Core
    _thread_id: str | None
    _run_id: str | None
    # The core of an id until it is read: no request pays for ids that it does not read.
    _request_id: str | Core
    _websocket_client_id: str | Core | None
    _lineage: tuple[int, str | None]  # the depth, and the request id of the parent
    _agent_context: dict[str, Any] | None
    _audit_metadata: dict[str, Any] | None
    _db_session: Any
    _environment: IsolatedEnvironment | None
    _exchange: "Exchange"  # there where the egress guard looks at what is sent
    _handles: dict[int, Ownership] | None
    _host: ContextHost | None
    registry_keys: tuple[str | tuple[str, str], ...]  # filled in by the registry
    _session_bound: bool  # there once a session is bound: no request pays for one that it does not bind

    def __init_subclass__(cls) -> None:
        if "__hash__" in cls.__dict__:  # defining __eq__ puts it there too
            raise TypeError(f"{cls.__name__} defines __eq__ or __hash__: contexts are told apart by identity")

    def __init__(
        self,
        *,
        user_id: str,
        thread_id: str,
        run_id: str,
        request_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        user_id = validate_id(user_id, "user_id")
        thread_id = validate_id(thread_id, "thread_id")
        run_id = validate_id(run_id, "run_id")
        request_id = None if request_id is None else validate_id(request_id, "request_id")
        core = UnifiedIDManager().generate_core()
        self._fill(
            user_id, thread_id, run_id, request_id, core, db_session, websocket_client_id, agent_context, audit_metadata
        )

    def _fill(
        self,
        user_id: str,
        thread_id: str | None,
        run_id: str | None,
        request_id: str | None,
        core: Core,
        db_session: Any,
        websocket_client_id: str | None,
        agent_context: Mapping[str, Any] | None,
        audit_metadata: Mapping[str, Any] | None,
    ) -> None:
        """The constructor, from ids that are checked. Thread and run may be None where no request id is given."""
        if websocket_client_id is not None:
            websocket_client_id = validate_id(websocket_client_id, "websocket_client_id")
        self._start(user_id, core, Lifetime.begin(OPEN, caller()), False)
        if request_id is not None:
            self._request_id = request_id
        self._thread_id = thread_id
        self._run_id = run_id
        self._websocket_client_id = websocket_client_id
        self._agent_context = copy_data(agent_context, "agent_context", user_id) or None
        self._audit_metadata = copy_data(audit_metadata, "audit_metadata", user_id) or None
        self._take_session(db_session)

    def _start(self, user_id: str, core: Core, lifetime: Lifetime, anonymous: bool) -> None:
        """Fill in what every context has. ``core`` is what its own id and, until another is given, its request id are
        made from."""
        self._user_id = user_id
        self._anonymous = anonymous
        self._core = self._request_id = core
        self._lifetime = lifetime
        self._created = time.time()
        self._lineage = _ROOT
        self._thread_id = self._run_id = self._websocket_client_id = None
        self._parent = self._children = self._host = self._environment = self._handles = None
        self._agent_context = self._audit_metadata = self._db_session = None

    @classmethod
    def from_request(
        cls,
        *,
        user_id: str,
        thread_id: str,
        run_id: str,
        request_id: str | None = None,
        db_session: Any = None,
        websocket_client_id: str | None = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """A context from the ids of a request; see the class for what is copied, and for the errors."""
        return cls(
            user_id=user_id,
            thread_id=thread_id,
            run_id=run_id,
            request_id=request_id,
            db_session=db_session,
            websocket_client_id=websocket_client_id,
            agent_context=agent_context,
            audit_metadata=audit_metadata,
        )

    @classmethod
    def from_connection(
        cls,
        connection: Connection,
        *,
        user_id: str,
        db_session: Any = None,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """A context for a Starlette HTTPConnection, with new ids. Who the user is, the caller says; no header does."""
        ids = UnifiedIDManager()
        thread_id = ids.generate_thread_id()
        is_websocket = connection.scope["type"] == "websocket"
        return cls(
            user_id=user_id,
            thread_id=thread_id,
            run_id=ids.generate_run_id(thread_id),
            websocket_client_id=ids.generate_websocket_client_id() if is_websocket else None,
            db_session=db_session,
            agent_context=agent_context,
            audit_metadata=audit_metadata,
        )

    # Identity. Properties without setters, so that assigning one raises; readable for ever.

    @property
    def user_id(self) -> str:
        """Whose context this is. Of an anonymous one it changes once, when a user is bound."""
        return self._user_id

    @property
    def context_id(self) -> str:
        """This context's own id, which no other ever has; the audit trail names it by that."""
        return f"context_{core_text(self._core)}"

    @property
    def request_id(self) -> str:
        """The id of the request or connection: the one that was given, or one that is made and never repeats."""
        request_id = self._request_id
        if not isinstance(request_id, str):
            self._request_id = request_id = f"request_{core_text(request_id)}"
        return request_id

    @property
    def thread_id(self) -> str:
        """The thread of work that the request belongs to; made of the request's id when none was given."""
        # Ids that were not given derive from the core of the request id: two readers cannot see two different ones.
        return self._thread_id or thread_id_of(self.request_id)

    @property
    def run_id(self) -> str:
        """The run within the thread; made of the request's id when none was given."""
        return self._run_id or run_id_of(self.request_id)

    @property
    def websocket_client_id(self) -> str | None:
        """The id of the WebSocket connection; None for anything else."""
        client_id = self._websocket_client_id
        if client_id is not None and not isinstance(client_id, str):
            self._websocket_client_id = client_id = f"websocket_{core_text(client_id)}"
        return client_id

    @property
    def created_at(self) -> datetime:
        """When the context was made, aware, in UTC."""
        return datetime.fromtimestamp(self._created, UTC)

    @property
    def age_seconds(self) -> float:
        """How long ago the context was made."""
        return time.time() - self._created

    @property
    def _root(self) -> "UserExecutionContext":
        """The context of the whole request or connection that this one is a part of; itself where it is that."""
        context = self
        while isinstance(parent := context._parent, UserExecutionContext):
            context = parent
        return context

    @property
    def operation_depth(self) -> int:
        """0 for a root context, one more for each level of children."""
        return self._lineage[0]

    @property
    def parent_request_id(self) -> str | None:
        """The request id of the context that this is a child of; None for a root."""
        return self._lineage[1]

    @property
    def is_anonymous(self) -> bool:
        """True while no user is bound: ``user_id`` is then an unguessable id that no other context has."""
        return self._anonymous

    # The user's data.

    @property
    def agent_context(self) -> dict[str, Any]:
        """Data of this context alone. Raises ContextClosedError after teardown, when the mapping has been emptied."""
        self.require_usable()
        if self._agent_context is None:
            with Lifetime.transition:  # two threads must not each get a mapping of their own
                self._agent_context = {} if self._agent_context is None else self._agent_context
        return self._agent_context

    @property
    def audit_metadata(self) -> dict[str, Any]:
        """What the application adds to this context's audit records. Raises ContextClosedError after teardown."""
        self.require_usable()
        if self._audit_metadata is None:
            with Lifetime.transition:
                self._audit_metadata = {} if self._audit_metadata is None else self._audit_metadata
        return self._audit_metadata

    @property
    def db_session(self) -> Any:
        """The very object that was given, or None. Raises ContextClosedError after teardown."""
        self.require_usable()
        return self._db_session

    @property
    def environment(self) -> IsolatedEnvironment:
        """Configuration for this context: the application's, overlaid with what is set here and seen nowhere else."""
        self.require_usable()
        if self._environment is None:
            made = IsolatedEnvironment().overlay() if self._host is None else self._host.new_environment()
            with Lifetime.transition:
                self._environment = made if self._environment is None else self._environment
        return self._environment

    # Keys.

    def derive_key(self, kind: str, client_id: str) -> str:
        """The key under which to store what this user's client calls ``client_id``: a keyed hash of both, and of kind.

        ``kind`` is a name in the code, such as "thread": lowercase letters, digits and underscores. The key is the same
        for the same user in every context and process that has the secret, and no other user's. See the module
        ``keys`` for its form.

        A plugin that derives keys decides first, and then no secret is asked for.

        Whoever derives a key of an anonymous context settles it: the context has keys under its own unguessable id,
        which nothing later can find again, and binding it raises IdentityConflictError from then on.

        Raises InvalidContextError for a bad kind or id, CrossUserAccessError for code of another user,
        ContextClosedError, and ConfigurationError without a manager, and without a secret in production.
        """
        return self.candidate_keys(kind, client_id)[0]

    def candidate_keys(self, kind: str, client_id: str) -> tuple[str, ...]:
        """Every key that this may be stored under: ``derive_key``'s, then those under the previous secrets.

        One, except during a rotation. Raises as ``derive_key`` does.
        """
        return self._candidates("derive_key", kind, client_id)[1]

    def check_key(self, kind: str, client_id: str, found: str | None) -> str:
        """Return ``derive_key``'s answer when a record that was loaded is this user's own.

        ``found`` is the key that is stored with the record, None when there is no record. When the answer is another
        than ``found``, the record stands under a previous secret: store it under the answer.

        Raises CrossUserAccessError when the record is somebody else's and when there is none, which cannot be told
        apart, and as ``derive_key`` does.
        """
        keys, candidates = self._candidates("check_key", kind, client_id)
        return keys.check(candidates, kind, found)

    def _candidates(self, action: str, kind: str, client_id: str) -> tuple[OwnerKeys, tuple[str, ...]]:
        self.require_usable()
        kind, client_id = checked_names(kind, client_id)
        host = self._host
        if host is None:
            raise ConfigurationError(
                "the context lives under no manager, which has the secret that keys are derived by; open it with "
                "manager.create_isolated_context(), or put it under one with manager.set_context()"
            )
        host.require_owner(self._user_id, action)
        self._settle()
        if host.hooks.derive_key and (given := host.hooks.derive_key(self, kind, client_id)) is not None:
            return host.keys, (given,)
        return host.keys, host.keys.candidates(self._user_id, kind, client_id)

    def _settle(self) -> None:
        """Let an anonymous context stay what it is: what is stored under its keys would be lost by a bind."""
        context: object = self
        while isinstance(context, UserExecutionContext) and context.is_anonymous:
            with Lifetime.transition:
                if context._lifetime.state is UNBOUND:
                    context._lifetime.state = OPEN
            context = context._parent

    def own(self, target: T, *, name: str | None = None) -> T:
        """A handle that passes for ``target``, for this user's code, until this context closes.

        From another user's context its use raises CrossUserAccessError, which is recorded; after the teardown,
        ContextClosedError that says where the handle was made; after ``revoke_handle``, HandleRevokedError. ``name``
        stands for it in errors, its type's name when not given. Closing the target stays the caller's business.

        Raises InvalidContextError for a class, for plain data, which no handle can guard, and for a handle.
        """
        self.require_usable()
        if self._handles is None:
            with Lifetime.transition:
                self._handles = {} if self._handles is None else self._handles
        handle = own(self, target, name)
        self.require_usable()  # it may have closed meanwhile, and its teardown has then not seen this handle
        return handle

    def protect(self, value: str | bytes) -> None:
        """Have the egress guard look for this value in what is sent to any other user.

        For what was made at random, such as a session's token: the guard keeps a keyed hash, for the ``keep_seconds``
        of its ``EgressPolicy``. A value that two users protect is both users'.

        Raises InvalidContextError, without the value, for what is not token-shaped or has too little entropy,
        ConfigurationError where there is no guard, CrossUserAccessError for code of another user, ContextClosedError
        after teardown.
        """
        self.require_usable()
        host = self._host
        if host is None or host.egress is None:
            raise ConfigurationError(
                "there is no egress guard here to protect a value: open the context under a "
                "UserContextManager(egress=EgressPolicy())"
            )
        host.require_owner(self._user_id, "protect")
        host.egress.protect(self, value)

    # Life.

    def bind(self, user: Principal | str) -> None:
        """Give an anonymous context its user. Once; the same user again changes nothing.

        A principal whose credentials end brings the context's deadline forward to that. Raises IdentityConflictError
        for a second, different user, and when a session, a resource or a child was opened, or a key derived, while the
        context was anonymous; ContextLimitError when that user has too many contexts; UnauthenticatedError for expired
        credentials.
        """
        self.require_usable()
        principal = user if isinstance(user, Principal) else Principal(user)
        try:
            self._bind(principal)
        except IdentityConflictError:
            if self._host is not None:
                self._host.bind_refused(self, principal.user_id)
            raise

    def _bind(self, principal: Principal) -> None:
        seconds_left = principal.seconds_left()
        if self._lifetime.state is not UNBOUND:
            if self.is_anonymous:
                raise IdentityConflictError(
                    "the context is settled as an anonymous one: a key was derived, or it is a child; "
                    "bind the identity first"
                )
            if principal.user_id != self._user_id:
                raise IdentityConflictError(
                    "this context already has an identity, and it is another one; open a new context"
                )
            self._end_within(seconds_left)
            return
        if self._is_used:
            raise IdentityConflictError(
                "the context was used as an anonymous one: a session, a resource or a child is open; "
                "bind the identity first"
            )
        if self._host is not None:
            self._host.bind_context(self, principal.user_id)
        elif not self._become(principal.user_id):
            raise IdentityConflictError("the context closed, or was bound or used, at the same moment; open a new one")
        self._end_within(seconds_left)

    def refresh(self, user: Principal | str) -> None:
        """Let newer credentials of the same user take the place of those that the context was opened with.

        The context lives as long as they hold, and no longer than its own time. So a WebSocket outlives a token that
        was renewed in time, also where a child of its context is asked, such as a message's. Raises
        IdentityConflictError for another user and for an anonymous context, UnauthenticatedError for credentials that
        have expired, ContextClosedError after teardown, CrossUserAccessError for code of another user.
        """
        self.require_usable()
        principal = user if isinstance(user, Principal) else Principal(user)
        if self.is_anonymous or principal.user_id != self._user_id:
            if self._host is not None:
                self._host.bind_refused(self, principal.user_id)
            raise IdentityConflictError(
                "the credentials are not of this context's user; an anonymous context is given one with bind()"
            )
        seconds_left = principal.seconds_left()
        root = self._root  # which has a deadline, and its children with it
        if self._host is not None:
            self._host.renew_credentials(root, seconds_left)
        else:
            latest = None if seconds_left is None else time.monotonic() + seconds_left
            root._lifetime.renew(latest, time.monotonic)
        self.require_usable()  # it may have reached its deadline meanwhile

    def record(
        self,
        event: Literal["event_sent", "agent_run", "transaction"],
        *,
        outcome: Literal["ok", "denied", "failed"] = "ok",
        reason: str | None = None,
        seconds: float | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        """Put on record what an adapter did for this user: an event sent, a run of an agent, a transaction.

        ``reason`` says in a word why it did not end well, ``seconds`` how long it took. ``data`` is copied as plain
        values, bounded, and without what its names say is secret; never give what a user wrote. Under no manager there
        is no trail, and nothing is recorded.

        Raises CrossUserAccessError for code of another user, ContextClosedError after teardown except in the context's
        own releases, InvalidContextError for another event or outcome, and for a name in ``data`` that a record has
        itself.
        """
        self.require_usable()
        host = self._host
        if host is not None:
            host.require_owner(self._user_id, "record")
            host.report(self, event, outcome, reason, seconds, {} if data is None else data)

    def create_child_context(
        self,
        operation_name: str,
        *,
        agent_context: Mapping[str, Any] | None = None,
        audit_metadata: Mapping[str, Any] | None = None,
    ) -> "UserExecutionContext":
        """A context for a part of this one's work: same user, thread, run and session; a copy of its data; own
        resources.

        It closes with its parent at the latest, and never closes the parent's session. Raises ContextLimitError at
        depth 10 and at 100 live children, ContextClosedError after teardown.
        """
        self.require_usable()
        _check_operation_name(operation_name)
        if self.operation_depth >= MAX_DEPTH:
            raise ContextLimitError("depth", MAX_DEPTH, "children nest too deeply: open siblings instead")
        ids = UnifiedIDManager() if self._host is None else self._host.ids
        child = object.__new__(UserExecutionContext)
        child._start(self._user_id, ids.generate_core(), Lifetime.begin(OPEN, caller()), self._anonymous)
        child._thread_id, child._run_id = self.thread_id, self.run_id
        child._websocket_client_id = self._websocket_client_id
        child._lineage = (self.operation_depth + 1, self.request_id)
        child._parent = self
        child._lifetime.lease = self._lifetime.lease
        child._db_session = self._db_session
        if self._agent_context or agent_context:
            data = {**self.agent_context, **(agent_context or {})}
            child._agent_context = copy_data(data, "agent_context", self._user_id)
        if self._audit_metadata or audit_metadata:
            data = {**self.audit_metadata, **(audit_metadata or {})}
            child._audit_metadata = copy_data(data, "audit_metadata", self._user_id)
        child._host = self._host
        if not self._adopt(child):
            raise self._closed_error()
        if child._user_id != self._user_id:
            child.close()
            raise IdentityConflictError("the context was bound at the same moment; open the child again")
        if self._host is not None:
            self._host.child_opened(child, operation_name)
        return child

    def bind_session(self, session: T) -> T:
        """Have the manager's plugins tie a database session to this context's user, before anything is asked of it.

        For adapters, wherever a session or a transaction begins, also in a thread and in a driver's callback. Returns
        the session; raises what a plugin raises, and the session must then not be used. An anonymous context with a
        bound session gets no user any more. Under no manager there are no plugins, and nothing is tied.

        Raises ContextClosedError after teardown.
        """
        self.require_usable()
        if self._host is not None and self._host.hooks.bind_session:
            with Lifetime.transition:
                self._session_bound = True  # before: who the session is tied to must not change meanwhile
            self._host.hooks.bind_session(self, session)
        return session

    def verify_isolation(self) -> bool:
        """True when this context shares nothing mutable with its parent, the session excepted.

        Raises ContextIsolationError that names what it shares, and ContextClosedError after teardown. What users share
        with each other is found by the manager's ``validate_isolation``.
        """
        self.require_usable()
        parent = self._parent  # looked at once: another thread may close this context meanwhile
        if not isinstance(parent, UserExecutionContext):
            return True
        # As if the parent were another user: a child must not share even with its parent, the session excepted.
        roots = [root for root in self._own_roots() if not root.stands]
        roots += [
            Root(f"{root.owner} (parent)", root.label, root.value) for root in parent._own_roots() if not root.stands
        ]
        if findings := find_shared(roots, self._user_id):
            raise ContextIsolationError(
                "the context shares mutable data with its parent", [str(finding) for finding in findings]
            )
        return True

    def isolation_roots(self) -> list[Root]:
        """Where the walk over what is reachable from this context and its children begins."""
        roots = self._own_roots()
        for child in tuple(self._children or ()):
            if isinstance(child, UserExecutionContext):
                roots += child.isolation_roots()
        return roots

    def _own_roots(self) -> list[Root]:
        owner, lifetime = self._user_id, self._lifetime
        opened = lifetime.where()
        roots = [
            Root(owner, f"{owner}.{name}", value, opened=opened, is_named_by_owner=True)
            for name, value in (("agent_context", self._agent_context), ("audit_metadata", self._audit_metadata))
            if value
        ]
        roots += [Root(owner, f"{owner}.{name}", value, opened=opened) for name, value in list(self.__dict__.items())]
        held = [*lifetime.targets(), ("db_session", self._db_session), ("variables", lifetime.variables)]
        for owned in list((self._handles or {}).values()):
            held += [(owned.name, target) for target in owned.targets()]
        # Stands for a session and the like, which are what they are for: a child has its parent's.
        roots += [Root(owner, f"{owner}.{name}", value, True, opened) for name, value in held if value is not None]
        return roots

    def metadata_given(self) -> dict[str, Any]:
        """A copy of ``audit_metadata``; empty when there is none, also after teardown.

        Never raises, so that no record fails an operation: what cannot be copied is shown as the name of its type.
        """
        metadata = self._audit_metadata
        return {name: _copied(value) for name, value in list(metadata.items())} if metadata else {}

    def end(self, reason: CloseReason) -> bool:
        """Close a context that holds nothing, from the task that ran its handler: the short way of most requests.

        False when it holds something, or something else is closing it: then nothing was done.
        """
        lifetime = self._lifetime
        state = lifetime.state
        # No lock: under the GIL threads come in between calls, of which there is none until the state is set.
        if (
            (state is not OPEN and state is not UNBOUND)
            or lifetime.resources
            or self._children
            or self._parent is not None
            or (lifetime.lease is not None and lifetime.is_lost)  # the long way says so
        ):
            return False
        lifetime.state = CLOSING
        lifetime.reason = reason
        metadata = self._wipe()
        lifetime.state = CLOSED
        lifetime.loop = lifetime.task = lifetime.variables = None
        if lifetime.closing is not None:  # somebody waits for it
            lifetime.finish_closing()
        host = self._host
        if host is not None:
            self._host = None
            host.context_ended(self, metadata)
        return True

    # Views.

    def to_dict(self) -> dict[str, Any]:
        """Identity and metadata as plain values, and the names of what ``agent_context`` holds. Never its values."""
        return {
            "user_id": self._user_id,
            "thread_id": self.thread_id,
            "run_id": self.run_id,
            "request_id": self.request_id,
            "websocket_client_id": self.websocket_client_id,
            "created_at": self.created_at.isoformat(),
            "operation_depth": self.operation_depth,
            "parent_request_id": self.parent_request_id,
            "is_anonymous": self.is_anonymous,
            "state": self._lifetime.state.value,
            "has_db_session": self._db_session is not None,
            "agent_context_keys": sorted(map(str, self._agent_context or ())),
            "audit_metadata": self.metadata_given(),
        }

    def get_audit_trail(self) -> dict[str, Any]:
        """What an auditor asks of one context: its identity, age in seconds, and the application's metadata."""
        shown = self.to_dict()
        del shown["agent_context_keys"]
        return {**shown.pop("audit_metadata"), **shown, "context_age_seconds": self.age_seconds}

    def __reduce__(self) -> NoReturn:
        # Also what copy and deepcopy ask: a copy would be a second live context that nothing closes.
        raise TypeError("a UserExecutionContext is not copied or pickled; use create_child_context(), or pass its ids")

    def __repr__(self) -> str:
        return f"<UserExecutionContext {self._user_id!r} {self.request_id} {self._lifetime.state.value}>"

    # For the manager and the middleware.

    @classmethod
    def _with_own_ids(
        cls,
        user_id: str,
        core: Core,
        db_session: Any,
        websocket_client_id: str | None,
        agent_context: Mapping[str, Any] | None,
        audit_metadata: Mapping[str, Any] | None,
    ) -> Self:
        """A context whose ids all derive from one core."""
        context = object.__new__(cls)
        context._fill(user_id, None, None, None, core, db_session, websocket_client_id, agent_context, audit_metadata)
        return context

    @property
    def context(self) -> Self:
        """Itself: as what code can run inside of."""
        return self

    @property
    def host(self) -> ContextHost | None:
        """The manager that this context lives under."""
        return self._host

    def _attach(self, host: ContextHost) -> bool:
        """Put the context under a manager. False when it is under another one."""
        if self._host is None:
            self._host = host
        return self._host is host

    def _detach(self) -> None:
        """Undo ``_attach``: the manager refused the context."""
        self._host = self._lifetime.journal = None

    def _give_back(self) -> None:
        """Close without releasing: the context was refused, and its session is still the caller's."""
        self._host = self._lifetime.resources = None
        self.close("failed")

    def _become(self, user_id: str) -> bool:
        """The one transition from unbound to open. False when it was made already, or came too late."""
        lifetime = self._lifetime
        with Lifetime.transition:
            # The state is looked at last: from there on nothing is called, so nothing can close the context.
            if self._is_used or lifetime.state is not UNBOUND:
                return False
            self._user_id = user_id
            self._anonymous = False
            lifetime.state = OPEN
        if lifetime.journal is not None:  # what plugins wrap the context with is no use of it
            lifetime.journal.bound(user_id)
        return True

    @property
    def _is_used(self) -> bool:
        """Whether a session, a resource or a child is open, each of which knows the user that was there then."""
        return (
            self._db_session is not None
            or self._handles is not None
            or self._lifetime.is_used
            or bool(self._children)
            or hasattr(self, "_session_bound")
        )

    # Inside.

    def _end_within(self, seconds: float | None) -> None:
        """Let the context outlive no credentials that end."""
        if seconds is None:
            return
        if self._host is not None:
            self._host.end_within(self, seconds)
        else:
            self._lifetime.limit(time.monotonic() + seconds, time.monotonic)

    def _hold(self, name: str, target: object, release: Callable[[BaseException | None], object]) -> None:
        """Release a thing with the error that the context ends in; its release may be asynchronous."""
        self._push(Resource(name, target, release, DEFAULT_RELEASE_TIMEOUT, False))

    def _lend_session(self) -> None:
        """Put a handle of this context's in the place of the session that it has from its parent."""
        if self._db_session is not None:
            self._handles = {} if self._handles is None else self._handles
            self._db_session = lend(self, self._db_session, "db_session")

    def _take_session(self, session: Any) -> None:
        self._db_session = session
        if session is not None and (hasattr(session, "aclose") or hasattr(session, "close")):
            self._lifetime.add(closing_resource(session, "db_session", DEFAULT_RELEASE_TIMEOUT))

    def _begin_journal(self) -> None:
        if self._lifetime.journal is None and self._host is not None:
            self._host.journal_of(self)

    def _around_resource(self, cm: object, name: str | None) -> Sequence[Wrapping]:
        host = self._host
        if host is None or not host.hooks.around_resource:
            return ()
        return host.hooks.around_resource(self, name or name_of(cm))

    def _say_closing(self) -> None:
        if self._host is not None:
            self._host.context_closing(self)

    def _releasing(self) -> Release:
        return Release(self)

    @property
    def _is_of_run(self) -> bool:
        return hasattr(self, "_agent_run")

    @property
    def _strays(self) -> Strays:
        return Strays() if self._host is None else self._host.strays

    def _wipe(self) -> Mapping[str, object] | None:
        host = self._host
        if host is not None and host.closing_inspector is not None and self._parent is None:
            host.closing_inspector.context_closes(self)
        metadata = None
        if self._audit_metadata:
            metadata = self.metadata_given()
            self._audit_metadata.clear()
        if self._agent_context:
            self._agent_context.clear()
        if self._environment is not None:
            self._environment.clear()
        attributes = self.__dict__
        if attributes:
            for name in list(attributes):
                if not hasattr(type(self), name):  # what shadows a method is a test's mock, which takes itself away
                    del attributes[name]
        if (handles := self._handles) is not None:
            self._handles = None
            for owned in list(handles.values()):
                owned.end()
        self._db_session = self._environment = None
        return metadata

    def _say_closed(self, metadata: Mapping[str, object] | None) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.context_closed(self, metadata)


def _check_operation_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_LENGTH or not name.isprintable():
        rule = f"is not text, blank, longer than {MAX_LENGTH} characters or not printable"
        raise InvalidContextError("operation_name", rule, "name what the child does, such as 'search'")


def _copied(value: object) -> object:
    try:
        return copy_data({"value": value}, "audit_metadata")["value"]
    except InvalidContextError:
        return f"<{type(value).__name__}>"
