"""Writes what happens to contexts into a ledger, and reads one user's trail back."""

# A record takes the ids that a context was given, and derives the others only when it is read, as the context does.
# pyright: reportPrivateUsage=false

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import count
from os import urandom
from typing import Any, Final, Literal, cast

from ucm_middleware.audit.denials import OTHERS, Denials, Kind
from ucm_middleware.audit.journal import Journal
from ucm_middleware.audit.ledger import DurableLedger, Ledger
from ucm_middleware.audit.records import (
    COMPLIANCE_VERSION,
    FOR_A_CONNECTION,
    TRUSTED_CODE,
    AskedFor,
    AuditRecord,
    Data,
    Event,
    Outcome,
    Row,
    UserMention,
    iso,
)
from ucm_middleware.audit.redaction import for_record, text_for_record
from ucm_middleware.audit.reports import checked_report
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import (
    ClusterUnavailableError,
    ContextLimitError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    LedgerUnavailableError,
    ManagerDrainingError,
    OriginError,
    UnauthenticatedError,
    UserContextError,
)
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import RESERVED_PREFIX, Core
from ucm_middleware.lifetime import Journal as JournalPort
from ucm_middleware.lifetime import Lifetime
from ucm_middleware.reachability import Finding

CUT_OFF: Final = frozenset({"expired", "revoked"})
"""The reasons to close a context that have a record of their own."""

_REFUSALS: Final[tuple[tuple[type[UserContextError], str], ...]] = (
    (ContextLimitError, "limit"),
    (UnauthenticatedError, "unauthenticated"),
    (InvalidContextError, "invalid"),
    (ManagerDrainingError, "draining"),
    (LedgerUnavailableError, "ledger"),
    (ClusterUnavailableError, "cluster"),
    (IdentityConflictError, "conflict"),
    (CrossUserAccessError, "foreign"),
    (OriginError, "origin"),
)
_BY_RESOLVER: Final = "resolver"

Where = tuple[str, Core, str | Core, str | None, str | None]
"""In whose trail, and the ids of the context: its core; the request's, the thread's and the run's, as given."""

LostBy = Literal["full", "cluster"]
"""By what an event is lost: a connection that did not keep up, or a store of the cluster that could not be asked."""

ANONYMOUS: Final = RESERVED_PREFIX
"""Stands for all anonymous users where their denials are counted."""

SHOWN_FINDINGS: Final = 100
"""How many breaches of isolation one look puts on record."""

SHOWN_HOLDERS: Final = 20
"""How many of what holds one closed context are put on record."""

SETTLE_TIMEOUT: Final = 10.0
"""Seconds that synchronous code waits in strict mode for a record to be durable."""

_ENDED_WELL: Final = frozenset({"finished", "closed", "cleared", "replaced"})


class AuditTrail:
    """One method for each thing worth a record."""

    __slots__ = ("__weakref__", "_append", "_denials", "_durable", "_ledger", "_next_id", "_strict")

    _next_id: Callable[[], int]

    def __init__(
        self, ledger: Ledger, clock: Callable[[], float], plan: Callable[[float], None], *, is_strict: bool = False
    ) -> None:
        self._ledger = ledger
        self._durable = ledger if isinstance(ledger, DurableLedger) else None
        self._strict = self._durable if is_strict else None
        self._append = ledger.append
        self._denials = Denials(self._counted, clock, plan)
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Ids of its own for each process: 64 random bits above a number."""
        self._next_id = count(int.from_bytes(urandom(8)) << 64).__next__

    def carry_with(self, carry: Callable[[Row], Row] | None) -> None:
        """Pass each record through this on its way to the ledger; None for nothing in between."""
        append = self._ledger.append

        def carried(row: Row) -> None:
            append(row if carry is None else carry(row))

        self._append = append if carry is None else carried

    def opened(self, context: UserExecutionContext, source: str) -> None:
        """A context began to live, or was put under another key."""
        self._about(context, "opened", data=_opening(source, context))
        if resources := context._lifetime.resources:  # the session, say, that it was made with
            self.journal_of(context)
            for resource in list(resources):
                context._lifetime.entered(resource)

    def connected(self, context: UserExecutionContext) -> None:
        """The same for the context of a connection, which begins without any data: on the path of each request."""
        core = context._core
        self._append(
            (
                "opened",
                context._created,
                context._user_id,
                None,
                core,
                core,
                None,
                None,
                "ok",
                None,
                None,
                FOR_A_CONNECTION,
                self._next_id(),
                0,
                0,
            )
        )

    def child_opened(self, child: UserExecutionContext, operation_name: str) -> None:
        """A part of a context's work began in a context of its own."""
        parent = child._parent
        if isinstance(parent, UserExecutionContext):
            self.journal_of(parent).child_opened()
        data = ("operation", operation_name), ("parent_request_id", child.parent_request_id)
        self._about(child, "child_opened", data=data)

    def bound(self, context: UserExecutionContext, anonymous_id: str) -> None:
        """An anonymous context learned its user; stands in the trails of both."""
        self._about(context, "opened", data=_opening("bind", context))
        self._about(context, "bound", data=(("anonymous_id", UserMention(anonymous_id)),))
        self._about(context, "bound", data=(("user_id", UserMention(context.user_id)),), user_id=anonymous_id)

    def refreshed(self, context: UserExecutionContext) -> None:
        """The credentials behind a context were replaced by others of the same user."""
        self._about(context, "refreshed")

    def answered(self, context: UserExecutionContext, status: int | None) -> None:
        """The answer is about to be complete: an HTTP status, or a close code of a WebSocket."""
        self._about(context, "answered", data=(("status", status),))

    def closed(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        """A context's teardown is through. ``metadata`` is what the application had added by then, None for nothing."""
        now = time.time()
        lifetime = context._lifetime
        reason = lifetime.reason
        outcome: Outcome = "ok" if reason in _ENDED_WELL else "failed"
        data: Data = ()
        if lifetime.closing is not None and (failures := lifetime.failures):
            outcome = "failed"
            data = (("unreleased", [text_for_record(str(failure)) for failure in failures]),)
        if lifetime.journal is not None:
            data = (*lifetime.journal.statistics(), *data)
        if metadata:
            data = (*data, ("audit_metadata", for_record(metadata)))
        self._append(
            (
                "closed",
                now,
                context._user_id,
                None,
                context._core,
                context._request_id,
                context._thread_id,
                context._run_id,
                outcome,
                reason,
                now - context._created,
                data,
                self._next_id(),
                0,
                0,
            )
        )

    def journal_of(self, context: UserExecutionContext) -> JournalPort:
        """The context's journal, from the first thing on that it is for."""
        lifetime = context._lifetime
        if lifetime.journal is None:
            made = Journal(self, context)
            with Lifetime.transition:  # one journal, or the counts would be in two
                if lifetime.journal is None:
                    lifetime.journal = made
        return lifetime.journal

    def resource_entered(self, journal: Journal, name: str) -> None:
        """A context holds a resource from now on."""
        self._of_resource(journal, "resource_entered", name)

    def resource_exited(self, journal: Journal, name: str, handed_over: bool) -> None:
        """It was released, or handed over to the context that took this one's place."""
        self._of_resource(journal, "resource_exited", name, data=(("handed_over", True),) if handed_over else ())

    def resource_failed(self, journal: Journal, name: str, reason: str, error: str) -> None:
        """It was not released, or not as it should. Of the error its type: what it says may be secret."""
        self._of_resource(journal, "resource_failed", name, "failed", reason, (("error", error),))

    def cut_off(self, context: UserExecutionContext) -> None:
        """A context begins to close because its time is over, or its user was signed out."""
        self._about(
            context,
            "expired" if context._lifetime.reason == "expired" else "revoked",
            seconds=time.time() - context._created,
        )

    def reported(
        self,
        context: UserExecutionContext,
        event: str,
        outcome: str,
        reason: str | None,
        seconds: float | None,
        data: Mapping[str, object],
    ) -> None:
        """What an adapter did for a user. Raises InvalidContextError for what breaks a rule."""
        report = checked_report(event, outcome, reason, seconds, data)
        self._about(context, *report)

    def agent_run(
        self, context: UserExecutionContext, outcome: Outcome, reason: str | None, seconds: float | None, data: Data
    ) -> None:
        """What happened in a run of an agent."""
        self._about(context, "agent_run", outcome, reason, seconds, data)

    def event_sent(
        self, actor: UserExecutionContext | None, user_id: str, data: Data, lost: LostBy | None = None
    ) -> None:
        """An event was put in line for a user's connections; ``lost`` is by what an event is lost with it."""
        by: str | None = None
        core: Core | None = None
        request_id: str | Core | None = None
        thread_id = run_id = None
        if actor is None:
            by = TRUSTED_CODE
        elif actor._user_id == user_id:
            core, request_id = actor._core, actor._request_id
            thread_id, run_id = actor._thread_id, actor._run_id
        else:
            by = actor._user_id
        # On the path of each event, so a plain row.
        self._append(
            (
                "event_sent",
                time.time(),
                user_id,
                by,
                core,
                request_id,
                thread_id,
                run_id,
                "ok" if lost is None else "failed",
                lost,
                None,
                data,
                self._next_id(),
                0,
                0,
            )
        )

    def cluster_unopened(self, number: int) -> None:
        """So many things from the store that workers share did not open: altered, or none of this application's."""
        self._about_nobody("cluster", "failed", "unopened", data=(("count", number),))

    def event_lost(self, user_id: str, kind: str | None, lost: LostBy, sequence: int | None = None) -> None:
        """An event that was sent, or came from another worker, has not reached a connection."""
        about: Data = ("type", kind), ("sequence", sequence)
        data = tuple(one for one in about if one[1] is not None)
        self._about_nobody("event_sent", "failed", lost, user_id=user_id, actor_id=TRUSTED_CODE, data=data)

    def user_revoked(
        self, actor_id: str | None, user_id: str, reason: str, contexts: int, notice: str | None = None
    ) -> None:
        """A user is signed out everywhere. Each context has a record of its own besides. With ``notice``, another
        worker has said so, and these are the contexts here.
        """
        by = TRUSTED_CODE if actor_id is None else None if actor_id == user_id else actor_id
        data: Data = (("contexts", contexts),) if notice is None else (("contexts", contexts), ("notice", notice))
        self._about_nobody("revoked", "ok", text_for_record(reason), user_id=user_id, actor_id=by, data=data)

    def knows(self, user_id: str) -> bool:
        """Whether a user was ever seen."""
        return self._ledger.knows(user_id)

    async def knows_soon(self, user_id: str) -> bool:
        """The same without holding up an event loop: a durable ledger waits for its line, and reads its files."""
        return self.knows(user_id) if self._durable is None else await asyncio.to_thread(self.knows, user_id)

    def denied(self, actor: UserExecutionContext | None, action: str, asked_for: AskedFor) -> None:
        """Someone asked for what is not theirs; stands in the trail of the one who asked."""
        if actor is not None and (host := actor._host) is not None:  # perhaps another manager
            host.journal_of(actor).denied()
        action = text_for_record(action)
        if not self._denials.has_record((_whose(actor), "denied", action)):
            return
        data = ("action", action), *_asked_for(asked_for)
        if actor is None:
            self._about_nobody("denied", "denied", actor_id=TRUSTED_CODE, data=data)
        else:
            self._about(actor, "denied", "denied", data=data)

    def refused(self, user_id: str | None, error: Exception, detail: str) -> None:
        """No context was opened: a limit, a bad id, no identity, or the server is draining."""
        reason = next((word for kind, word in _REFUSALS if isinstance(error, kind)), _BY_RESOLVER)
        if self._denials.has_record((user_id, "refused", reason)):
            # What an application says of credentials may name somebody.
            shown = type(error).__name__ if isinstance(error, UnauthenticatedError) else text_for_record(detail)
            data = (("detail", shown),)
            self._about_nobody("refused", "denied", reason, user_id=user_id, data=data)

    def tell_due(self) -> None:
        """Put on record the denials that were counted until now, of times that are over."""
        self._denials.tell_due()

    def tell_counted(self) -> None:
        """Put on record all denials that were counted until now."""
        self._denials.tell_all()

    def next_wake(self) -> float | None:
        """When ``tell_due`` has something to do, on the manager's clock."""
        return self._denials.next_wake()

    def _counted(self, kind: Kind, number: int, first: float, last: float) -> None:
        """So many more of a kind were denied or refused in a while."""
        user_id, event, word = kind
        data: Data = ("count", number), ("first", iso(first)), ("last", iso(last))
        if event == "refused":
            self._about_nobody(event, "denied", word, user_id=user_id, data=data)
        elif event == "egress":
            self._about_nobody(event, "failed", data=(("where", word), *data))
        else:
            data = (("action", word), *data)
            if user_id == ANONYMOUS:
                self._about_nobody(event, "denied", data=(("of", "anonymous users"), *data))
            else:
                actor_id = TRUSTED_CODE if user_id is None and word is not OTHERS else None
                self._about_nobody(event, "denied", user_id=user_id, actor_id=actor_id, data=data)

    def privileged(self, actor: UserExecutionContext | None, reason: str, users: Sequence[str] | None) -> None:
        """Someone was granted access to others' contexts, or to everyone's.

        The actor's trail says to whose. The trails of those say why, and what is shown of them neither by whom nor who
        else was named.
        """
        actor_id = TRUSTED_CODE if actor is None else actor.user_id
        reason = text_for_record(reason)
        data = (("users", "everyone" if users is None else [UserMention(user_id) for user_id in users]),)
        if actor is None:
            self._about_nobody("privileged", "ok", reason, actor_id=actor_id, data=data)
        else:
            self._about(actor, "privileged", reason=reason, data=data)
        for user_id in users or ():
            if user_id != actor_id and self._ledger.knows(user_id):  # a typo makes no user
                self._about_nobody("privileged", "ok", reason, user_id=user_id, actor_id=actor_id)

    def settle(self) -> None:
        """In strict mode: wait until all that was written down is durable. Raises LedgerUnavailableError."""
        if self._strict is not None:
            self._strict.flush(SETTLE_TIMEOUT)

    def wait_for_room(self) -> None:
        """Where a durable ledger does not keep up: wait until it does. Raises LedgerUnavailableError."""
        ledger = self._durable
        if ledger is not None and not ledger.has_room:
            ledger.flush(SETTLE_TIMEOUT)

    def require_room(self) -> None:
        """Before what cannot be taken back, such as an event that is sent: raise LedgerUnavailableError where a durable
        ledger cannot be written and has no room for a record either.
        """
        ledger = self._durable
        if ledger is not None and not ledger.has_room and (problem := ledger.problem) is not None:
            raise LedgerUnavailableError(problem)

    def isolation_violated(self, findings: Sequence[Finding]) -> None:
        """Two users' contexts were found to share something.

        What is nobody's says which users and what kind of thing. Where it hangs in each one's own data stands in their
        own trails: not the whole path, for the one who reaches the other's data reaches the other's keys too.
        """
        shared = [
            {
                "users": [UserMention(finding.first_owner), UserMention(finding.second_owner)],
                "type": text_for_record(finding.type_name),
            }
            for finding in findings
        ]
        self._about_nobody("isolation_violated", "failed", data=(("findings", shared[:SHOWN_FINDINGS]),))
        for finding in findings[:SHOWN_FINDINGS]:
            for user_id, path in (
                (finding.first_owner, finding.first_place),
                (finding.second_owner, finding.second_place),
            ):
                data = ("path", text_for_record(path)), ("type", text_for_record(finding.type_name))
                self._about_nobody("isolation_violated", "failed", user_id=user_id, data=data)

    def egress(self, receiver_id: str, owners: Sequence[str], data: Data, *, is_blocked: bool) -> None:
        """Another user's protected value was in what was sent to somebody, or would have been.

        Who it was sent to, and whose it is, stands in nobody's trail. The owners' trails say that it happened, not to
        whom, nor under which of the names that stood there; the receiver's says nothing, or it would tell who has
        guessed well.
        """
        if not self._denials.has_record((None, "egress", " ".join(str(value) for _, value in data))):
            return
        outcome: Outcome = "denied" if is_blocked else "failed"
        mentions = [UserMention(owner) for owner in owners]
        about: Data = (*data, ("receiver", UserMention(receiver_id)), ("owners", mentions))
        self._about_nobody("egress", outcome, data=about)
        for owner in owners:
            self._about_nobody("egress", outcome, user_id=owner, data=tuple(one for one in data if one[0] != "field"))

    def cluster_is(self, state: str, reason: str | None) -> None:
        """How this worker stands with the store that workers share, from now on."""
        outcome: Outcome = "ok" if reason is None else "failed"
        self._about_nobody("cluster", outcome, reason, data=(("state", state),))

    def outlived(self, context: UserExecutionContext, kinds: Sequence[str], holders: Sequence[str]) -> None:
        """A context has closed, and something still holds it: what, by kind and in words."""
        data = (
            ("kinds", sorted(set(kinds))),
            ("holders", [text_for_record(holder) for holder in holders[:SHOWN_HOLDERS]]),
        )
        self._about(context, "outlived", "failed", data=data)

    def of(self, user_id: str) -> dict[str, Any] | None:
        """One user's trail, a copy; None for a user never seen. Fixed fields win over metadata of the same name."""
        self._denials.tell(user_id)
        trail = self._ledger.trail(user_id)
        if trail is None:
            return None
        opening = trail.opening
        about = {} if opening is None else dict(opening.data)
        return {
            **_newest_metadata((*(() if opening is None else (opening,)), *trail.records)),
            "user_id": user_id,
            "context_set_at": None if opening is None else iso(opening.at),
            "context_source": about.get("source"),
            "isolation_verified": about.get("isolation_verified", False),
            "compliance_version": COMPLIANCE_VERSION,
            "events": [record.to_dict() for record in trail.records],
            "events_dropped": trail.dropped,
        }

    def of_system(self) -> list[dict[str, Any]]:
        """The records that stand in no user's trail."""
        self._denials.tell(None)
        trail = self._ledger.trail(None)
        return [] if trail is None else [record.to_dict() for record in trail.records]

    def _about(
        self,
        context: UserExecutionContext,
        event: Event,
        outcome: Outcome = "ok",
        reason: str | None = None,
        seconds: float | None = None,
        data: Data = (),
        user_id: str | None = None,
    ) -> None:
        """A record of something in a context; in the trail of its user, or of another one that is named."""
        user_id = context._user_id if user_id is None else user_id
        where = user_id, context._core, context._request_id, context._thread_id, context._run_id
        self._in(where, event, outcome, reason, seconds, data)

    def _of_resource(
        self,
        journal: Journal,
        event: Event,
        name: str,
        outcome: Outcome = "ok",
        reason: str | None = None,
        data: Data = (),
    ) -> None:
        """A record of a resource of a context, which may be gone."""
        where = journal.user_id, journal.core, journal.request_id, journal.thread_id, journal.run_id
        self._in(where, event, outcome, reason, None, (("name", text_for_record(name)), *data))

    def _in(
        self, where: Where, event: Event, outcome: Outcome, reason: str | None, seconds: float | None, data: Data
    ) -> None:
        user_id, core, request_id, thread_id, run_id = where
        self._append(
            AuditRecord(
                event,
                time.time(),
                user_id,
                None,
                core,
                request_id,
                thread_id,
                run_id,
                outcome,
                reason,
                seconds,
                data,
                self._next_id(),
            )
        )

    def _about_nobody(
        self,
        event: Event,
        outcome: Outcome,
        reason: str | None = None,
        *,
        user_id: str | None = None,
        actor_id: str | None = None,
        data: Data = (),
    ) -> None:
        """A record of something that happened in no context of the one, if any, in whose trail it stands."""
        self._append(
            AuditRecord(
                event,
                time.time(),
                user_id,
                actor_id,
                outcome=outcome,
                reason=reason,
                data=data,
                record_id=self._next_id(),
            )
        )


def _whose(actor: UserExecutionContext | None) -> str | None:
    """Whose denials are counted together: all anonymous users', since each request may be a new one."""
    if actor is None:
        return None
    return ANONYMOUS if actor._anonymous else actor._user_id


def _newest_metadata(records: Sequence[AuditRecord]) -> dict[str, Any]:
    found = (value for record in reversed(records) for name, value in record.data if name == "audit_metadata")
    return deepcopy(cast("dict[str, Any]", next(found, dict[str, Any]())))


def _opening(source: str, context: UserExecutionContext) -> Data:
    # Verified: set_context, create_* and bind ask verify_isolation(), which raises when it is not so; the context of a
    # connection begins without any data.
    opening = ("source", source), ("isolation_verified", True)
    metadata = context.metadata_given()
    return (*opening, ("audit_metadata", for_record(metadata))) if metadata else opening


def _asked_for(asked: AskedFor) -> Data:
    if isinstance(asked, tuple):
        return ("asked_for", asked[0]), ("asked_for_request", text_for_record(asked[1]))
    return (("asked_for", asked if isinstance(asked, UserMention) else text_for_record(asked)),)
