"""``ucm doctor postgres``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Final

import psycopg
import typer

from ucm_middleware import ConfigurationError
from ucm_middleware.cli.terminal import BAD, refusals, say, say_json
from ucm_postgres.binding import SETTING, Binding
from ucm_postgres.connecting import connect
from ucm_postgres.doctor.examine import examine, unaccepted
from ucm_postgres.doctor.findings import SEVERITIES, Finding, Severity

_STYLES: Final[dict[Severity, str]] = {"serious": "bold red", "warning": "yellow", "info": "cyan"}


def postgres(
    dsn: Annotated[
        str,
        typer.Argument(
            help="The database, with the login of the application: postgresql://USER:PASSWORD@HOST:PORT/DATABASE.",
            envvar="UCM_POSTGRES_DSN",
            show_default=False,
        ),
    ],
    setting: Annotated[str, typer.Option(help="The setting that policies read the user from.")] = SETTING,
    role: Annotated[
        str | None, typer.Option(help="The role that transactions take on, if they do.", show_default=False)
    ] = None,
    signed: Annotated[bool, typer.Option("--signed", help="User ids are signed (the hardened mode).")] = False,
    user_column: Annotated[str, typer.Option(help="The column by which a table is known to hold users' rows.")] = (
        "user_id"
    ),
    accept: Annotated[
        list[str] | None,
        typer.Option(help="The KIND:OBJECT of a finding that is meant to be so. May be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON, for a program.")] = False,
) -> None:
    """Look for what lets one user reach the rows of another, and print the SQL that mends it. Changes nothing.

    Ends with 1 when something was found that is more than an info, and with 2 when the database could not be examined.
    Set UCM_POSTGRES_DSN, or PGPASSWORD, to keep a password out of the list of processes.
    """
    with refusals(as_json=as_json):
        binding = Binding(setting, role, signed=signed)
        with connect(dsn) as connection:
            database, login = connection.info.dbname, connection.info.user
            try:
                found = unaccepted(examine(connection, binding, user_column=user_column), accept or ())
            except psycopg.Error as error:
                raise ConfigurationError(f"the examination broke off: {str(error).strip()}") from None
    if as_json:
        say_json(
            {
                "database": database,
                "login": login,
                "findings": [asdict(finding) for finding in found],
                "not_examined": ["pool"],
            }
        )
    else:
        _tell(f"{database}, as {login}", found)
    if any(finding.severity != "info" for finding in found):
        raise typer.Exit(BAD)


def _tell(what: str, found: Sequence[Finding]) -> None:
    for finding in found:
        say(f"{finding.severity}: {_harmless(finding.key)}", style=_STYLES[finding.severity])
        say(f"  {_harmless(finding.problem)}")
        for line in finding.sql.split("\n") if finding.sql else ():
            say(f"    {_harmless(line)}", style="bold")
    counts = Counter(finding.severity for finding in found)
    counted = ", ".join(f"{counts[severity]} {severity}" for severity in SEVERITIES if counts[severity])
    healthy = not counts["serious"] and not counts["warning"]
    say(
        f"{'healthy' if healthy else 'not healthy'}: {what}" + (f" ({counted})" if counted else ""),
        style="bold green" if healthy else "bold red",
    )
    say("not looked at: the application's pool; let it call examine_pool() when it starts", err=True)


def _harmless(text: str) -> str:
    # A name may hold what a terminal takes for an order. As it is, it is in the JSON.
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
