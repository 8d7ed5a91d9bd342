"""``ucm audit erase``."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.encoding import encode_plain
from ucm_middleware.audit.file import LedgerFile
from ucm_middleware.audit.sqlite import erasure
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.cli.audit.opening import EnvFile, Ledger, secrets_from
from ucm_middleware.cli.terminal import BAD, refusals, say
from ucm_middleware.errors import ErasureIncompleteError
from ucm_middleware.ids import validate_id


def erase(
    ledger: Ledger,
    keys: Annotated[Path, typer.Option(help="The file with the users' keys.", show_default=False)],
    user: Annotated[str, typer.Option(help="Who is to be erased.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; it is put on record, so name nobody in it.", show_default=False)],
    env_file: EnvFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy a user's keys, so that what is on record of them can never be read again. The chain still verifies.

    Ends with 1 when nothing is on record of the user.
    """
    with refusals():
        user = validate_id(user, "user")
        with (
            closing(LedgerFile.open(ledger, sealed=True, must_exist=True)) as file,
            closing(Vault.open(keys, file.stream, secrets_from(env_file), must_exist=True)) as vault,
        ):
            if vault.find(user) is None:
                say("nothing is on record of this user: never seen here, or erased already", err=True)
                raise typer.Exit(BAD)
            if not yes and not typer.confirm(f"Erase {user} from {ledger}? This cannot be undone."):
                raise typer.Exit(BAD)
            try:
                tokens = vault.erase(user)
            except ErasureIncompleteError as error:
                file.append([encode_plain(erasure(error.subjects, reason))])
                raise
            if tokens:
                file.append([encode_plain(erasure(tokens, reason))])
    say(f"erased: {len(tokens)} subjects, the anonymous ones that became this user among them", style="bold green")
