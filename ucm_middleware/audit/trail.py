"""Writes what happens to contexts into a ledger, and reads one user's trail back."""

# A record takes the ids that a context was given, and derives the others only when it is read, as the context does.
# pyright: reportPrivateUsage=false

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import count
from os import urandom
from typing import Any, Final, cast

from ucm_middleware.audit.ledger import Ledger
from ucm_middleware.audit.records import (
    COMPLIANCE_VERSION,
    TRUSTED_CODE,
    AuditRecord,
    Data,
    Event,
    Outcome,
    Row,
    UserMention,
    iso,
)
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.forking import renewed_after_fork

_ENDED_WELL: Final = frozenset({"finished", "closed", "cleared", "replaced"})
_FOR_A_CONNECTION: Final[Data] = (("source", "connection"), ("isolation_verified", True))


class AuditTrail:
    """One method for each thing worth a record."""

    __slots__ = ("__weakref__", "_append", "_ledger", "_next_id")

    _next_id: Callable[[], int]

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._append = ledger.append
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
                _FOR_A_CONNECTION,
                self._next_id(),
                0,
                0,
            )
        )

    def child_opened(self, child: UserExecutionContext, operation_name: str) -> None:
        """A part of a context's work began in a context of its own."""
        data = ("operation", operation_name), ("parent_request_id", child.parent_request_id)
        self._about(child, "child_opened", data=data)

    def bound(self, context: UserExecutionContext, anonymous_id: str) -> None:
        """An anonymous context learned its user; stands in the trails of both."""
        self._about(context, "opened", data=_opening("bind", context))
        self._about(context, "bound", data=(("anonymous_id", UserMention(anonymous_id)),))
        self._about(context, "bound", data=(("user_id", UserMention(context.user_id)),), user_id=anonymous_id)

    def closed(self, context: UserExecutionContext, metadata: Mapping[str, object] | None) -> None:
        """A context's teardown is through. ``metadata`` is what the application had added by then, None for nothing."""
        now = time.time()
        lifetime = context._lifetime
        reason = lifetime.reason
        outcome: Outcome = "ok" if reason in _ENDED_WELL else "failed"
        data: Data = ()
        if lifetime.closing is not None and (failures := lifetime.failures):
            outcome = "failed"
            data = (("unreleased", [str(failure) for failure in failures]),)
        if metadata:
            data = (*data, ("audit_metadata", metadata))
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

    def denied(self, actor: UserExecutionContext | None, action: str, asked_for: str) -> None:
        """Someone asked for what is not theirs; stands in the trail of the one who asked."""
        data = ("action", action), ("asked_for", UserMention(asked_for))
        if actor is None:
            self._about_nobody("denied", "denied", actor_id=TRUSTED_CODE, data=data)
        else:
            self._about(actor, "denied", "denied", data=data)

    def refused(self, user_id: str | None, reason: str, error: str) -> None:
        """No context was opened: a limit, a bad id, no identity, or the server is draining. ``error`` is which kind of
        error says so.
        """
        self._about_nobody("refused", "denied", reason, user_id=user_id, data=(("error", error),))

    def privileged(self, actor: UserExecutionContext | None, reason: str, users: Sequence[str] | None) -> None:
        """Someone was granted access to others' contexts, or to everyone's.

        The actor's trail says to whose. The trails of those say why, and what is shown of them neither by whom nor who
        else was named.
        """
        actor_id = TRUSTED_CODE if actor is None else actor.user_id
        data = (("users", "everyone" if users is None else [UserMention(user_id) for user_id in users]),)
        if actor is None:
            self._about_nobody("privileged", "ok", reason, actor_id=actor_id, data=data)
        else:
            self._about(actor, "privileged", reason=reason, data=data)
        for user_id in users or ():
            if user_id != actor_id and self._ledger.trail(user_id) is not None:  # a typo makes no user
                self._about_nobody("privileged", "ok", reason, user_id=user_id, actor_id=actor_id)

    def isolation_violated(self, findings: Sequence[str]) -> None:
        """Two users' contexts were found to share something."""
        self._about_nobody("isolation_violated", "failed", data=(("findings", list(findings)),))

    def of(self, user_id: str) -> dict[str, Any] | None:
        """One user's trail, a copy; None for a user never seen. Fixed fields win over metadata of the same name."""
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
        trail = self._ledger.trail(None)
        return [] if trail is None else [record.to_dict() for record in trail.records]

    def _about(
        self,
        context: UserExecutionContext,
        event: Event,
        outcome: Outcome = "ok",
        reason: str | None = None,
        data: Data = (),
        user_id: str | None = None,
    ) -> None:
        """A record of something in a context; in the trail of its user, or of another one that is named."""
        self._append(
            AuditRecord(
                event,
                time.time(),
                context._user_id if user_id is None else user_id,
                None,
                context._core,
                context._request_id,
                context._thread_id,
                context._run_id,
                outcome,
                reason,
                data=data,
                record_id=self._next_id(),
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


def _newest_metadata(records: Sequence[AuditRecord]) -> dict[str, Any]:
    found = (value for record in reversed(records) for name, value in record.data if name == "audit_metadata")
    return deepcopy(cast("dict[str, Any]", next(found, dict[str, Any]())))


def _opening(source: str, context: UserExecutionContext) -> Data:
    # Verified: set_context, create_* and bind ask verify_isolation(), which raises when it is not so; the context of a
    # connection begins without any data.
    opening = ("source", source), ("isolation_verified", True)
    metadata = context.metadata_given()
    return (*opening, ("audit_metadata", metadata)) if metadata else opening
