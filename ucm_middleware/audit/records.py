"""One record for each thing that happens to a context."""

from copy import deepcopy
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

from ucm_middleware.ids import Core, core_text, is_own_request_id, run_id_of, thread_id_of

COMPLIANCE_VERSION: Final = "1.0"
"""The version of the trail's shape."""

Event = Literal["opened", "child_opened", "bound", "closed", "denied", "refused", "privileged", "isolation_violated"]
Outcome = Literal["ok", "denied", "failed"]

Data = tuple[tuple[str, object], ...]
"""Names, each with a plain value."""

Row = tuple[
    Event, float, str | None, str | Core | None, str | None, str | None, Outcome, str | None, float | None, Data
]
"""The fields of a record, in order. Only what is read becomes a record: making one costs thrice what a tuple does."""


class AuditRecord(NamedTuple):
    """What happened, to whom, when and why. ``AuditRecord(*row)`` makes one of a row, and each is a row itself.

    ``user_id`` is the user in whose trail the record stands; ``None`` for what trusted code did for nobody in
    particular. ``at`` is in seconds since the epoch. ``request`` is the request id, or the core of one that nobody
    has read yet; thread and run are those that were given. ``seconds`` is how long a context lived that closed.
    """

    event: Event
    at: float
    user_id: str | None
    request: str | Core | None = None
    given_thread_id: str | None = None
    given_run_id: str | None = None
    outcome: Outcome = "ok"
    reason: str | None = None
    seconds: float | None = None
    data: Data = ()

    def __repr__(self) -> str:
        return f"<AuditRecord {self.event} {self.user_id!r} {self.request_id} {self.outcome}>"  # the data may be secret

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
        """The record as plain values, without the fields that say nothing."""
        shown: dict[str, object] = {"event": self.event, "at": iso(self.at), "outcome": self.outcome}
        for name in ("request_id", "thread_id", "run_id", "reason", "seconds"):
            if (value := getattr(self, name)) is not None:
                shown[name] = _shown(value)
        shown.update({name: _shown(value) for name, value in self.data if name not in shown})
        return shown


def iso(at: float) -> str:
    """A time in seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def _shown(value: object) -> object:
    """A copy; of a number of seconds, as far as it means something."""
    return round(value, 6) if isinstance(value, float) else deepcopy(value)
