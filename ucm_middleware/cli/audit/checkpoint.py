"""``ucm audit checkpoint``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.checkpoints import append_checkpoint, read_private_key, sign_checkpoint
from ucm_middleware.audit.verification import read_checkpoints, verify_ledger
from ucm_middleware.cli.audit.verify import require_records, tell
from ucm_middleware.cli.terminal import BAD, progress_bar, refusals, say


def checkpoint(
    ledger: Annotated[Path, typer.Argument(help="The file of the ledger; it may be in use.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The private key to sign with.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The file of checkpoints to add to.", show_default=False)],
) -> None:
    """Verify a ledger, also against its earlier checkpoints, and sign what it is now.

    What does not verify is not signed. Keep the file where those who can write to the ledger cannot.
    """
    with refusals():
        private_key = read_private_key(key)
        is_first = not os.path.exists(to) or os.path.getsize(to) == 0
        earlier = () if is_first else read_checkpoints(to, private_key.public_key())
        with progress_bar() as progress:
            found = verify_ledger(ledger, earlier, progress)
        if not found.is_verified:
            tell(ledger, found)
            raise typer.Exit(BAD)
        require_records(ledger, found)
        if earlier and found.covered == found.records:
            say(f"nothing to sign: the last checkpoint is over all {found.records} records")
            return
        append_checkpoint(to, sign_checkpoint(found.stream, found.records, found.root, private_key))
    say(f"signed: {found.records} records of {found.stream}, in {to}", style="bold green")
