"""``ucm audit keygen``."""

from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.checkpoints import generate_key
from ucm_middleware.cli.terminal import refusals, say


def keygen(
    file: Annotated[
        Path, typer.Argument(help="The file for the private key. The public one goes to FILE.pub.", show_default=False)
    ],
) -> None:
    """Make a pair of keys for checkpoints. Overwrites nothing."""
    with refusals():
        public = generate_key(file)
    say(f"private key, for those who make checkpoints: {file}")
    say(f"public key, for those who verify: {public}")
