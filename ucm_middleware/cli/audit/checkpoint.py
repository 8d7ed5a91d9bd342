"""``ucm audit checkpoint``."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ucm_middleware.audit.checkpoints import append_checkpoint, read_private_key, sign_checkpoint
from ucm_middleware.audit.verification import (
    Checkpoint,
    Verification,
    read_checkpoints,
    verify_ledger,
    verify_together,
)
from ucm_middleware.cli.audit.findings import tell, tell_together
from ucm_middleware.cli.audit.places import open_all, place_of
from ucm_middleware.cli.audit.verify import require_records
from ucm_middleware.cli.terminal import BAD, progress_bar, refusals, say

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def checkpoint(
    ledger: Annotated[
        str,
        typer.Argument(help="The file of the ledger, which may be in use, or postgresql://...", show_default=False),
    ],
    key: Annotated[Path, typer.Option(help="The private key to sign with.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The file of checkpoints to add to.", show_default=False)],
) -> None:
    """Verify a ledger, also against its earlier checkpoints, and sign what it is now; at a URL, each stream there.

    What does not verify is not signed. Keep the file where those who can write to the ledger cannot.
    """
    with refusals():
        private_key = read_private_key(key)
        is_first = not os.path.exists(to) or os.path.getsize(to) == 0
        earlier = () if is_first else read_checkpoints(to, private_key.public_key())
        found = _verified(ledger, earlier)
        streams = {checkpoint.stream for checkpoint in earlier}
        unsigned = [each for each in found if each.covered < each.records or each.stream not in streams]
        for each in unsigned:
            _sign(each, private_key, to)
        if not unsigned:
            say(f"nothing to sign: the last checkpoint is over all {sum(each.records for each in found)} records")


def _verified(ledger: str, earlier: Sequence[Checkpoint]) -> Sequence[Verification]:
    """What can be signed. Ends the command where something is wrong."""
    if place_of(ledger) is None:
        with progress_bar() as progress:
            found = verify_ledger(Path(ledger), earlier, progress)
        if not found.is_verified:
            tell(ledger, found)
            raise typer.Exit(BAD)
        require_records(ledger, found)
        return (found,)
    with progress_bar() as progress, ExitStack() as stack:
        together = verify_together(open_all([ledger], stack), earlier, progress=progress)
    for each in together.ledgers:
        if not isinstance(each.found, Verification):
            raise each.found
    if not together.is_verified:
        tell_together(together)
        raise typer.Exit(BAD)
    return together.verified


def _sign(found: Verification, key: "Ed25519PrivateKey", to: Path) -> None:
    append_checkpoint(to, sign_checkpoint(found.stream, found.records, found.root, key))
    say(f"signed: {found.records} records of {found.stream}, in {to}", style="bold green")
