"""``ucm audit show``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ucm_middleware.audit.reading import SHOWN
from ucm_middleware.audit.records import AuditRecord
from ucm_middleware.cli.audit.opening import EnvFile, Keys, Ledger, reading
from ucm_middleware.cli.terminal import BAD, refusals, say, say_json
from ucm_middleware.errors import LedgerFileError

_SHOWN_APART = frozenset({"at", "event", "outcome", "reason", "request_id"})
_UNFOLDED = 10_000  # columns: a program that reads it must not find an id in two pieces
_REST = "context_id", "thread_id", "run_id"
_LAST = "trace_id", "span_id"  # long, and of no use to whoever only reads


def show(
    ledger: Ledger,
    user: Annotated[
        str | None, typer.Option(help="Whose trail; without it, what is nobody's.", show_default=False)
    ] = None,
    keys: Keys = None,
    env_file: EnvFile = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest records.")] = SHOWN,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, for a program.")] = False,
) -> None:
    """Show the trail of one user, oldest first.

    Ends with 1 when nothing is on record.
    """
    with refusals(as_json=as_json), reading(ledger, keys, env_file) as reader:
        if user is not None and reader.is_sealed and keys is None:
            raise LedgerFileError(reader.name, "is sealed, and its users are found by their keys", "give --keys")
        trail = reader.trail(user, last)
    if trail is None or not trail.records:
        say("nothing is on record" + ("" if user is None else " of this user: never seen here, or erased"), err=True)
        raise typer.Exit(BAD)
    if as_json:
        for record in trail.records:
            say_json(record.to_dict())
        return
    console = Console()
    if not console.is_terminal:
        console.width = _UNFOLDED
    console.print(_table(trail.records))
    if trail.dropped:
        say(f"{trail.dropped} older records are not shown: --last shows more", err=True)


def _table(records: tuple[AuditRecord, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("time", "event", "outcome", "reason", "request", "more"):
        table.add_column(title, overflow="fold")
    for record in records:
        shown = record.to_dict()
        rest = [name for name in shown if name not in {*_SHOWN_APART, *_REST}]
        more = ", ".join(f"{name}={shown[name]}" for name in sorted(rest, key=_LAST.__contains__))
        cells = (
            str(shown["at"]), record.event, record.outcome, record.reason or "", record.request_id or "", more
        )  # fmt: skip
        # As Text: what a client has called something must not be taken for markup.
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    return table


def _printable(text: str) -> str:
    """Without what would command a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
