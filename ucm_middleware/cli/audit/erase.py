"""``ucm audit erase``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ucm_middleware.audit.erasure import checked_reason, erase_user
from ucm_middleware.cli.audit.opening import EnvFile, Ledger, secrets_from
from ucm_middleware.cli.audit.places import place_of
from ucm_middleware.cli.terminal import BAD, refusals, say
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

    Sign the user out first. What was cut short is completed by doing it again. Ends with 1 when nothing is on record of
    the user.
    """
    with refusals():
        user, reason = validate_id(user, "user"), checked_reason(reason)
        place = place_of(ledger)
        where = ledger if place is None else "the database"  # a URL may have a password in it
        if not yes and not typer.confirm(f"Erase {user} from {where}? This cannot be undone."):
            raise typer.Exit(BAD)
        erase_there = partial(erase_user, Path(ledger)) if place is None else partial(place.erase_user, ledger)
        erased = erase_there(keys, secrets_from(env_file), user, reason)
    if not erased:
        say("nothing is on record of this user: never seen here, or erased already", err=True)
        raise typer.Exit(BAD)
    say(f"erased: {erased} subjects, the anonymous ones that became this user among them", style="bold green")
