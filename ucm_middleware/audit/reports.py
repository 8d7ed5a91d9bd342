"""What adapters report of their own work, checked before it becomes a record."""

import math
from collections.abc import Mapping
from typing import Final, cast, get_args

from ucm_middleware.audit.records import MENTIONING, AuditRecord, Data, Event, Outcome
from ucm_middleware.audit.redaction import for_record, text_for_record
from ucm_middleware.errors import InvalidContextError
from ucm_middleware.isolation import type_name

REPORTED: Final[tuple[Event, ...]] = ("event_sent", "agent_run", "transaction")
"""What adapters do for a user; everything else the core sees itself."""

_OUTCOMES: Final = frozenset(get_args(Outcome))
_OWN_NAMES: Final = MENTIONING | {*AuditRecord._fields, "context_id", "request_id", "thread_id", "run_id"}


def checked_report(
    event: object, outcome: object, reason: object, seconds: object, data: object
) -> tuple[Event, Outcome, str | None, float | None, Data]:
    """The five as they go into a record. Raises InvalidContextError for one that breaks a rule."""
    if event not in REPORTED:
        raise InvalidContextError("event", "is none that adapters report", f"give one of {', '.join(REPORTED)}")
    if outcome not in _OUTCOMES:
        raise InvalidContextError("outcome", "is no outcome", "give 'ok', 'denied' or 'failed'")
    if reason is not None and (not isinstance(reason, str) or not reason.strip()):
        raise InvalidContextError("reason", "is not text, or blank", "say why in a word, or leave it out")
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf
    ):
        raise InvalidContextError("seconds", "is no finite number of at least 0", "say how long it took, or nothing")
    if not isinstance(data, Mapping):
        raise InvalidContextError("data", f"must be a mapping, not {type_name(data)}", "give a dict with str keys")
    for name in cast("Mapping[object, object]", data):
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise InvalidContextError("data", "has a name that is empty, or no printable text", "rename it")
        if name in _OWN_NAMES:
            raise InvalidContextError(f"data[{name!r}]", "is the name of a field that records have", "rename it")
    return (
        event,
        cast("Outcome", outcome),
        None if reason is None else text_for_record(reason),
        None if seconds is None else float(seconds),
        tuple(for_record(cast("Mapping[str, object]", data)).items()),
    )
