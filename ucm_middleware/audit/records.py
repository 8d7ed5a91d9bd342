"""One record for each thing that happens to a context."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

COMPLIANCE_VERSION: Final = "1.0"
"""The version of the trail's shape."""

Event = Literal["opened", "child_opened", "bound", "closed", "denied", "refused", "privileged", "isolation_violated"]
Outcome = Literal["ok", "denied", "failed"]


@dataclass(slots=True, eq=False)
class AuditRecord:
    """What happened, to whom, when and why.

    ``user_id`` is the user in whose trail the record stands; ``None`` for what trusted code did for nobody in
    particular. ``at`` is in seconds since the epoch. ``data`` holds plain values only and is never changed after.
    """

    event: Event
    at: float
    user_id: str | None
    request_id: str | None = None
    thread_id: str | None = None
    run_id: str | None = None
    outcome: Outcome = "ok"
    reason: str | None = None
    data: Mapping[str, object] | None = None

    def to_dict(self) -> dict[str, object]:
        """The record as plain values, without the fields that say nothing."""
        shown: dict[str, object] = {"event": self.event, "at": iso(self.at), "outcome": self.outcome}
        for name in ("request_id", "thread_id", "run_id", "reason"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        shown.update({name: deepcopy(value) for name, value in (self.data or {}).items() if name not in shown})
        return shown


def iso(at: float) -> str:
    """A time in seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()
