"""One record for each thing that happens to a context."""

from collections.abc import Mapping
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, cast

from ucm_middleware.ids import Core, core_text, is_own_request_id, run_id_of, thread_id_of

COMPLIANCE_VERSION: Final = "1.0"
"""The version of the trail's shape."""

Event = Literal[
    "opened",
    "child_opened",
    "bound",
    "refreshed",
    "resource_entered",
    "resource_exited",
    "resource_failed",
    "event_sent",
    "agent_run",
    "transaction",
    "denied",
    "refused",
    "privileged",
    "expired",
    "revoked",
    "answered",
    "closed",
    "isolation_violated",
    "egress",
    "outlived",
    "erased",
    "cluster",
]
"""What can happen; docs/reference/audit-records.md says for each what its record holds."""

Outcome = Literal["ok", "denied", "failed"]

TRUSTED_CODE: Final = ""
"""Stands for the actor where code did it that ran in no user's context. No user id is empty."""

Data = tuple[tuple[str, object], ...]
"""Names, each with a plain value."""

FOR_A_CONNECTION: Final[Data] = (("source", "connection"), ("isolation_verified", True))
"""The data of the opening of a connection's context, which begins without any of the application's."""

Row = tuple[
    Event,
    float,
    str | None,
    str | None,
    Core | None,
    str | Core | None,
    str | None,
    str | None,
    Outcome,
    str | None,
    float | None,
    Data,
    Core,
    int,
    int,
]
"""The fields of a record, in order. Only what is read becomes a record: making one costs thrice what a tuple does."""


MENTIONING: Final = frozenset({"anonymous_id", "asked_for", "findings", "owners", "receiver", "user_id", "users"})
"""The members of ``data`` in which users are named. Elsewhere what looks like a subject is the application's."""


class UserMention(str):
    """A user id in the data of a record: a durable ledger does not write it down as text, so that it can be erased."""

    __slots__ = ()


AskedFor = str | tuple[UserMention, str]
"""What was denied: a user, something else in words, or a user's request."""


def mention(key: str | tuple[str, str]) -> AskedFor:
    """What a key of the manager asks for. One that is text may be a user's id."""
    return UserMention(key) if isinstance(key, str) else (UserMention(key[0]), key[1])


class AuditRecord(NamedTuple):
    """What happened, to whom, when and why. ``AuditRecord(*row)`` makes one of a row, and each is a row itself.

    ``user_id`` is the user in whose trail the record stands, its subject; ``None`` for what concerns nobody in
    particular. ``actor_id`` is who did it: None when that is the subject, "" for trusted code in no user's context.
    ``at`` is in seconds since the epoch. ``context`` is the core of the context's id; ``request`` the request id, or
    its core when nobody has read it yet; thread and run are those that were given. ``seconds`` is how long something
    took, of a context that closed: how long it lived. ``record_id`` is the record's own id, which the span that
    carries it has too; ``trace_id`` and ``span_id`` are that span's, 0 when there is none.
    """

    event: Event
    at: float
    user_id: str | None
    actor_id: str | None = None
    context: Core | None = None
    request: str | Core | None = None
    given_thread_id: str | None = None
    given_run_id: str | None = None
    outcome: Outcome = "ok"
    reason: str | None = None
    seconds: float | None = None
    data: Data = ()
    record_id: Core = 0
    trace_id: int = 0
    span_id: int = 0

    def __repr__(self) -> str:
        return f"<AuditRecord {self.event} {self.user_id!r} {self.request_id} {self.outcome}>"  # the data may be secret

    @property
    def context_id(self) -> str | None:
        """The context, None where there was none."""
        return None if self.context is None else f"context_{core_text(self.context)}"

    @property
    def request_id(self) -> str | None:
        """The request, None where there was no context."""
        request = self.request
        return request if request is None or isinstance(request, str) else f"request_{core_text(request)}"

    @property
    def thread_id(self) -> str | None:
        """The thread; where none was given, the one that the context derives from the request."""
        request_id = self.request_id
        if self.given_thread_id is None and request_id is not None and is_own_request_id(request_id):
            return thread_id_of(request_id)
        return self.given_thread_id

    @property
    def run_id(self) -> str | None:
        """The run, likewise."""
        request_id = self.request_id
        if self.given_run_id is None and request_id is not None and is_own_request_id(request_id):
            return run_id_of(request_id)
        return self.given_run_id

    def to_dict(self) -> dict[str, object]:
        """The record as plain values, for the subject to see: without the actor, and the fields that say nothing."""
        shown: dict[str, object] = {"event": self.event, "at": iso(self.at), "outcome": self.outcome}
        for name in ("context_id", "request_id", "thread_id", "run_id", "reason", "seconds"):
            if (value := getattr(self, name)) is not None:
                shown[name] = _shown(value)
        for name, number, digits in (("trace_id", self.trace_id, 32), ("span_id", self.span_id, 16)):
            if number:
                shown[name] = f"{number:0{digits}x}"
        shown.update({name: _shown(value) for name, value in self.data if name not in shown})
        return shown


def iso(at: float) -> str:
    """A time in seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def _shown(value: object) -> object:
    """A copy as plain values; of a number of seconds, as far as it means something."""
    if isinstance(value, float):
        return round(value, 6)
    return deepcopy(without_mentions(value, str))


def without_mentions(value: object, instead: Any) -> object:
    """The value with ``instead(mention)`` in place of each mention of a user, in lists and mappings too."""
    if isinstance(value, UserMention):
        return instead(value)
    if isinstance(value, list | tuple):
        return [without_mentions(item, instead) for item in cast("list[object]", value)]
    if isinstance(value, Mapping):
        return {name: without_mentions(item, instead) for name, item in cast("Mapping[str, object]", value).items()}
    return value
