"""``ucm audit``: a module for each command."""

import typer

from ucm_middleware.cli.audit.checkpoint import checkpoint
from ucm_middleware.cli.audit.keygen import keygen
from ucm_middleware.cli.audit.verify import verify


def make_audit() -> typer.Typer:
    """The commands about the audit trail."""
    audit = typer.Typer(no_args_is_help=True, help="Verify the audit trail.")
    for command in (verify, checkpoint, keygen):
        audit.command()(command)
    return audit
