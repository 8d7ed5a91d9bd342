"""Reads and verifies ledgers. Imports nothing of what writes them: an error there cannot hide itself here."""

from ucm_middleware.audit.verification.evidence import Checkpoint, read_checkpoints, read_public_key
from ucm_middleware.audit.verification.source import Claims, End, Row, Source, Stage, Watch
from ucm_middleware.audit.verification.together import Examined, Given, Together, verify_together
from ucm_middleware.audit.verification.verifier import (
    Problem,
    Progress,
    Verification,
    verify_ledger,
    verify_source,
)

__all__ = [
    "Checkpoint",
    "Claims",
    "End",
    "Examined",
    "Given",
    "Problem",
    "Progress",
    "Row",
    "Source",
    "Stage",
    "Together",
    "Verification",
    "Watch",
    "read_checkpoints",
    "read_public_key",
    "verify_ledger",
    "verify_source",
    "verify_together",
]
