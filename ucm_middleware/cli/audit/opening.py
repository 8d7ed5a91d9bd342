"""What the commands that read a ledger's content have in common."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.reader import LedgerReader
from ucm_middleware.audit.reading import RecordReader
from ucm_middleware.cli.audit.places import place_of
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import SecretRing

Ledger = Annotated[
    str, typer.Argument(help="The file of the ledger, which may be in use, or postgresql://...", show_default=False)
]
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
def reading(ledger: str, keys: Path | None, env_file: Path | None) -> Generator[RecordReader]:
    """The ledger, open to be read. Raises LedgerFileError, also for one without any record."""
    secrets, place = secrets_from(env_file), place_of(ledger)
    opened = (
        LedgerReader.open(Path(ledger), keys, secrets) if place is None else place.open_reader(ledger, keys, secrets)
    )
    with opened as reader:
        if not reader.size:
            raise LedgerFileError(reader.name, "has no records yet", "give a ledger that an application has written to")
        yield reader
