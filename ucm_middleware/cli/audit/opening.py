"""What the commands that read a ledger's content have in common."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.reader import LedgerReader
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import SecretRing

Ledger = Annotated[Path, typer.Argument(help="The file of the ledger; it may be in use.", show_default=False)]
Keys = Annotated[
    Path | None,
    typer.Option(
        help="The file with the users' keys; UCM_SECRET must be set as for the application.", show_default=False
    ),
]
EnvFile = Annotated[Path | None, typer.Option(help="A file with settings, such as UCM_SECRET=...", show_default=False)]


def secrets_from(env_file: Path | None) -> SecretRing:
    """The secrets of the environment and of a settings file. Raises ConfigurationError."""
    return SecretRing.from_settings(None, None, IsolatedEnvironment(() if env_file is None else env_file))


@contextmanager
def reading(ledger: Path, keys: Path | None, env_file: Path | None) -> Generator[LedgerReader]:
    """The ledger, open to be read. Raises LedgerFileError, also for one without any record."""
    with LedgerReader.open(ledger, keys, secrets_from(env_file)) as reader:
        if not reader.size:
            raise LedgerFileError(str(ledger), "has no records yet", "give a ledger that an application has written to")
        yield reader
