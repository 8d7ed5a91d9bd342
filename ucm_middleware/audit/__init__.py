"""What is written down about contexts, and where: records, and the ledgers that keep them."""

from ucm_middleware.audit.ledger import DurableLedger, Ledger, Trail
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import AuditRecord, Row, UserMention
from ucm_middleware.audit.sqlite import SQLiteLedger

__all__ = ["AuditRecord", "DurableLedger", "Ledger", "MemoryLedger", "Row", "SQLiteLedger", "Trail", "UserMention"]
