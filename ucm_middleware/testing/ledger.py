"""A ledger that keeps every record, for tests that ask what was written down."""

from typing import Literal

from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.records import AuditRecord, Event, Row
from ucm_middleware.guard import EVERYONE, Everyone


class RecordingLedger:
    """Implements the ``Ledger`` port without a bound: ``UserContextManager(ledger=RecordingLedger())``."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: list[AuditRecord] = []

    def __repr__(self) -> str:
        return f"<RecordingLedger with {len(self._records)} records>"

    @property
    def records(self) -> list[AuditRecord]:
        """All records in the order they were written, whoever's they are. A copy."""
        return list(self._records)

    def select(self, *events: Event, user: str | Literal[Everyone.EVERYONE] | None = EVERYONE) -> list[AuditRecord]:
        """The records of these events, or of all, in order.

        ``user`` narrows them to one user's trail; None to what stands in nobody's, such as refusals before there was a
        user.
        """
        return [
            record
            for record in self.records
            if (not events or record.event in events) and (user is EVERYONE or record.user_id == user)
        ]

    def append(self, row: Row) -> None:
        """Keep a record. As the port says, from any thread."""
        self._records.append(AuditRecord(*row))

    def trail(self, user_id: str | None) -> Trail | None:
        """As the port says: one user's trail, None for a user never seen; of ``None``, what stands in no trail."""
        records = self.select(user=user_id)
        if not records and user_id is not None:
            return None
        opening = next((record for record in reversed(records) if record.event == "opened"), None)
        return Trail(None if user_id is None else opening, tuple(records), dropped=0)

    def knows(self, user_id: str) -> bool:
        """As the port says: whether there is a trail of this user."""
        return any(record.user_id == user_id for record in self._records)
