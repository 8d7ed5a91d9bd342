"""One record for each thing that happens to a context."""

from collections.abc import Mapping
from copy import deepcopy
from datetime import UTC, datetime
from typing import Final, Literal

from ucm_middleware.ids import is_own_request_id, run_id_of, thread_id_of

COMPLIANCE_VERSION: Final = "1.0"
"""The version of the trail's shape."""

Event = Literal["opened", "child_opened", "bound", "closed", "denied", "refused", "privileged", "isolation_violated"]
Outcome = Literal["ok", "denied", "failed"]


class AuditRecord:
    """What happened, to whom, when and why. Never changed after.

    ``user_id`` is the user in whose trail the record stands; ``None`` for what trusted code did for nobody in
    particular. ``at`` is in seconds since the epoch. ``data`` holds plain values only.
    """

    __slots__ = ("_run_id", "_thread_id", "at", "data", "event", "outcome", "reason", "request_id", "user_id")

    def __init__(
        self,
        event: Event,
        at: float,
        user_id: str | None,
        request_id: str | None = None,
        thread_id: str | None = None,
        run_id: str | None = None,
        outcome: Outcome = "ok",
        reason: str | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        self.event: Event = event
        self.at = at
        self.user_id = user_id
        self.request_id = request_id
        self._thread_id = thread_id
        self._run_id = run_id
        self.outcome: Outcome = outcome
        self.reason = reason
        self.data = data

    @property
    def thread_id(self) -> str | None:
        """The thread; where none was given, the one that the context derives from the request."""
        if self._thread_id is None and self.request_id is not None and is_own_request_id(self.request_id):
            return thread_id_of(self.request_id)
        return self._thread_id

    @property
    def run_id(self) -> str | None:
        """The run, likewise."""
        if self._run_id is None and self.request_id is not None and is_own_request_id(self.request_id):
            return run_id_of(self.request_id)
        return self._run_id

    def to_dict(self) -> dict[str, object]:
        """The record as plain values, without the fields that say nothing."""
        shown: dict[str, object] = {"event": self.event, "at": iso(self.at), "outcome": self.outcome}
        for name in ("request_id", "thread_id", "run_id", "reason"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        shown.update({name: _shown(value) for name, value in (self.data or {}).items() if name not in shown})
        return shown


def iso(at: float) -> str:
    """A time in seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def _shown(value: object) -> object:
    """A copy; of a number of seconds, as far as it means something."""
    return round(value, 6) if isinstance(value, float) else deepcopy(value)
