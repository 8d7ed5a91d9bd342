"""Reads and verifies ledgers. Imports nothing of what writes them: an error there cannot hide itself here."""

from ucm_middleware.audit.verification.evidence import Checkpoint, read_checkpoints, read_public_key
from ucm_middleware.audit.verification.ledger_file import Stage
from ucm_middleware.audit.verification.verifier import Problem, Progress, Verification, verify_ledger

__all__ = [
    "Checkpoint",
    "Problem",
    "Progress",
    "Stage",
    "Verification",
    "read_checkpoints",
    "read_public_key",
    "verify_ledger",
]
