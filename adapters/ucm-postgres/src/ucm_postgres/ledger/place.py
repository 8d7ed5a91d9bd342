"""What the command ``ucm audit`` finds for postgresql:// (an entry point of the group ``ucm_middleware.ledgers``)."""

from contextlib import AbstractContextManager
from pathlib import Path

from ucm_middleware.secret import SecretRing
from ucm_postgres.connecting import Target
from ucm_postgres.ledger import reading, verifying
from ucm_postgres.ledger.ledger import erase_at


def open_sources(url: str) -> AbstractContextManager[list[tuple[str, verifying.StreamSource]]]:
    """All streams there, for the verifier."""
    return verifying.open_sources(Target(url))


def open_reader(url: str, keys: Path | None, secrets: SecretRing) -> AbstractContextManager[reading.PostgresReader]:
    """What is there, to be read."""
    return reading.open_reader(Target(url), keys, secrets)


def erase_user(url: str, keys: Path, secrets: SecretRing, user_id: str, reason: str) -> int:
    """Erase a user whose keys are in a key file."""
    return erase_at(Target(url), keys, secrets, user_id, reason)
