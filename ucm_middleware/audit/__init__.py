"""What is written down about contexts, and where: records, and the ledger that keeps them."""

from ucm_middleware.audit.ledger import Ledger, MemoryLedger, Trail
from ucm_middleware.audit.records import AuditRecord, Row

__all__ = ["AuditRecord", "Ledger", "MemoryLedger", "Row", "Trail"]
