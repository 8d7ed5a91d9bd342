"""``ucm audit verify``."""

from base64 import b64encode
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.verification import Verification, read_checkpoints, read_public_key, verify_ledger
from ucm_middleware.cli.terminal import BAD, progress_bar, refusals, say, say_json
from ucm_middleware.errors import LedgerFileError


def verify(
    ledger: Annotated[Path, typer.Argument(help="The file of the ledger; it may be in use.", show_default=False)],
    checkpoints: Annotated[
        Path | None, typer.Option(help="A file of checkpoints, from where nobody else can write.", show_default=False)
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="The key that the checkpoints were signed with (.pub).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say it for a program.")] = False,
) -> None:
    """Verify each record of a ledger, and the whole against checkpoints.

    Ends with 0 when nothing is wrong, 1 when something is, and 2 when it could not be verified.
    """
    if (checkpoints is None) != (public_key is None):
        raise typer.BadParameter("--checkpoints and --public-key go together")
    with refusals(as_json=as_json), progress_bar() as progress:
        known = (
            ()
            if checkpoints is None or public_key is None
            else read_checkpoints(checkpoints, read_public_key(public_key))
        )
        found = verify_ledger(ledger, known, progress)
        require_records(ledger, found)
    if as_json:
        say_json(_plain(ledger, found))
    else:
        tell(ledger, found)
    if not found.is_verified:
        raise typer.Exit(BAD)


def require_records(ledger: Path, found: Verification) -> None:
    """Raise LedgerFileError for a ledger in which there is nothing yet."""
    if found.is_verified and not found.records:
        raise LedgerFileError(str(ledger), "has no records yet", "come back when an application has written to it")


def tell(ledger: Path, found: Verification) -> None:
    """Say what was found."""
    if not found.is_verified:
        say(f"NOT VERIFIED: {ledger}", style="bold red")
        for problem in found.problems:
            say(f"  {problem}")
        return
    kind = "sealed" if found.sealed else "plain"
    say(f"verified: {ledger}", style="bold green")
    say(f"  {found.records} records of {found.stream}, {kind}")
    say(f"  root {b64encode(found.root).decode()}")
    say(f"  {_evidence(found)}")


def _evidence(found: Verification) -> str:
    cannot = "that records were cut off at the end, or that the whole was written anew, cannot be seen"
    if not found.checkpoints:
        return f"no checkpoint was given: {cannot} without one"
    count = f"{found.checkpoints} checkpoint{'' if found.checkpoints == 1 else 's'}"
    if found.covered == found.records:
        return f"as {count} said, up to the last record"
    return (
        f"as {count} said, up to record {found.covered}; the {found.records - found.covered} after it are behind no "
        f"checkpoint: {cannot} there"
    )


def _plain(ledger: Path, found: Verification) -> dict[str, object]:
    return {
        "ledger": str(ledger),
        "verified": found.is_verified,
        "stream": found.stream,
        "sealed": found.sealed,
        "records": found.records,
        "root": b64encode(found.root).decode(),
        "checkpoints": found.checkpoints,
        "covered": found.covered,
        "problems": [{"record": problem.record, "message": problem.message} for problem in found.problems],
    }
