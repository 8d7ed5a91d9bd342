"""``ucm audit export``."""

import json

import typer

from ucm_middleware.cli.audit.opening import EnvFile, Keys, Ledger, reading
from ucm_middleware.cli.terminal import counting_bar, refusals, say


def export(ledger: Ledger, keys: Keys = None, env_file: EnvFile = None) -> None:
    """Write all records to stdout as JSON Lines, oldest first.

    Without --keys, of a sealed ledger, only what stands in the clear.
    """
    sealed = 0
    with (
        refusals(),
        reading(ledger, keys, env_file) as reader,
        counting_bar("records", reader.size) as advance,
    ):
        for stored in reader.records():
            typer.echo(json.dumps(stored.to_dict()))
            sealed += not stored.is_open
            advance()
    if sealed:
        why = "no --keys were given" if keys is None else "their users were erased"
        say(f"of {sealed} records only what stands in the clear was written: {why}", err=True)
