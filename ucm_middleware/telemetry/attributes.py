"""What a span says of a record: never a user id or free text, and of its data how a transaction went alone. Ids of
requests, threads and runs, as given.
"""

from collections.abc import Mapping
from typing import Final, get_args

from ucm_middleware.audit.records import AuditRecord
from ucm_middleware.events.policy import AGENT_EVENTS
from ucm_middleware.ids import core_text
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.telemetry.pseudonyms import Pseudonyms
from ucm_middleware.transactions import PHASES

Attributes = dict[str, str | int]

_OWN_WORDS: Final = frozenset(get_args(CloseReason))
"""The reasons that are shown, besides those of refusals. Others are the application's texts, and may name a person."""


def attributes_of(record: AuditRecord, pseudonyms: Pseudonyms) -> Attributes:
    """Of the record that a span begins with.

    ``enduser.pseudo.id`` is who did it, ``ucm.subject.pseudo.id`` in whose trail it stands when that is another.
    """
    attributes = _given(
        {
            "ucm.event": record.event,
            "ucm.record.id": core_text(record.record_id),
            "ucm.outcome": record.outcome,
            "ucm.reason": _reason(record),
            "ucm.context.id": record.context_id,
            "ucm.request.id": record.request_id,
            "ucm.thread.id": record.thread_id,
            "ucm.run.id": record.run_id,
            "enduser.pseudo.id": pseudonyms.of(record.user_id if record.actor_id is None else record.actor_id),
            "ucm.subject.pseudo.id": None if record.actor_id is None else pseudonyms.of(record.user_id),
        }
    )
    if record.event == "transaction":
        attributes.update(_transaction(dict(record.data)))
    elif record.event == "agent_run":
        attributes.update(_agent_run(dict(record.data)))
    return attributes


def end_attributes_of(record: AuditRecord) -> Attributes:
    """Of the record of a context's end, which its span ends with."""
    return _given(
        {
            "ucm.record.closed_id": core_text(record.record_id),
            "ucm.outcome": record.outcome,
            "ucm.reason": _reason(record),
        }
    )


def _transaction(data: dict[str, object]) -> Attributes:
    """Of what a ``TransactionLog`` has put on record; of anything else, which may be of users, nothing."""
    phase, database, statements = (data.get(name) for name in ("phase", "database", "statements"))
    if not isinstance(phase, str) or phase not in PHASES or not isinstance(database, str):
        return {}
    attributes: Attributes = {"ucm.transaction.phase": phase, "ucm.transaction.database": database}
    if isinstance(statements, int):
        attributes["ucm.transaction.statements"] = statements
    return attributes


def _agent_run(data: dict[str, object]) -> Attributes:
    """Of what happened in a run, in the names of OpenTelemetry's conventions for generative AI where it has them."""
    phase, agent, tool, call_id = (data.get(name) for name in ("phase", "agent", "tool", "call_id"))
    if phase not in AGENT_EVENTS or not isinstance(agent, str):
        return {}  # an adapter's own report, which may be of users
    attributes: Attributes = {"ucm.agent.phase": str(phase), "gen_ai.agent.name": agent}
    if phase == "tool_executing":
        attributes["gen_ai.operation.name"] = "execute_tool"
        attributes["gen_ai.tool.name"] = str(tool)
        if call_id is not None:
            attributes["gen_ai.tool.call.id"] = str(call_id)
    return attributes


def _reason(record: AuditRecord) -> str | None:
    return record.reason if record.event == "refused" or record.reason in _OWN_WORDS else None


def _given(attributes: Mapping[str, str | None]) -> Attributes:
    return {name: value for name, value in attributes.items() if value is not None}
