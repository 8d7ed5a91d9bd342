"""``ucm audit verify``."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.verification import (
    Checkpoint,
    Progress,
    Verification,
    read_checkpoints,
    read_public_key,
    verify_ledger,
    verify_together,
)
from ucm_middleware.cli.audit.findings import plain, plain_together, tell, tell_together
from ucm_middleware.cli.audit.places import open_all, place_of
from ucm_middleware.cli.terminal import BAD, NOT_DONE, progress_bar, refusals, say_json
from ucm_middleware.errors import LedgerFileError


def verify(
    ledgers: Annotated[
        list[str],
        typer.Argument(
            metavar="LEDGER...",
            help="The file of a ledger, which may be in use, or postgresql://... for all streams there.",
            show_default=False,
        ),
    ],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of checkpoints, from where nobody else can write. May be repeated.", show_default=False
        ),
    ] = None,
    public_key: Annotated[
        list[Path] | None,
        typer.Option(help="The key that they were signed with (.pub). May be repeated.", show_default=False),
    ] = None,
    expect: Annotated[
        int | None, typer.Option(min=1, help="How many streams there must be.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say it for a program.")] = False,
) -> None:
    """Verify each record of a ledger, and the whole against checkpoints; of several, also what they are together.

    Ends with 0 when nothing is wrong, 1 when something is, and 2 when it could not be verified.
    """
    if bool(checkpoints) != bool(public_key):
        raise typer.BadParameter("--checkpoints and --public-key go together")
    with refusals(as_json=as_json), progress_bar() as progress, ExitStack() as stack:
        known = _known(checkpoints or (), public_key or ())
        if len(ledgers) == 1 and expect is None and place_of(ledgers[0]) is None:
            status = _verify_one(ledgers[0], known, progress, as_json=as_json)
        else:
            together = verify_together(open_all(ledgers, stack), known, expect, progress)
            say_json(plain_together(together)) if as_json else tell_together(together)
            status = BAD if together.has_problems else 0 if together.is_complete else NOT_DONE
    raise typer.Exit(status)


def _verify_one(ledger: str, known: Sequence[Checkpoint], progress: Progress, *, as_json: bool) -> int:
    found = verify_ledger(Path(ledger), known, progress)
    require_records(ledger, found)
    say_json(plain(ledger, found)) if as_json else tell(ledger, found)
    return 0 if found.is_verified else BAD


def require_records(ledger: str, found: Verification) -> None:
    """Raise LedgerFileError for a ledger in which there is nothing yet."""
    if found.is_verified and not found.records:
        raise LedgerFileError(ledger, "has no records yet", "come back when an application has written to it")


def _known(files: Sequence[Path], keys: Sequence[Path]) -> tuple[Checkpoint, ...]:
    public_keys = [read_public_key(key) for key in keys]
    return tuple(checkpoint for file in files for checkpoint in read_checkpoints(file, *public_keys))
