"""``ucm audit``: a module for each command."""

import typer

from ucm_middleware.cli.audit.checkpoint import checkpoint
from ucm_middleware.cli.audit.erase import erase
from ucm_middleware.cli.audit.export import export
from ucm_middleware.cli.audit.keygen import keygen
from ucm_middleware.cli.audit.show import show
from ucm_middleware.cli.audit.verify import verify


def make_audit() -> typer.Typer:
    """The commands about the audit trail."""
    audit = typer.Typer(no_args_is_help=True, help="Read and verify the audit trail.")
    for command in (verify, checkpoint, keygen, show, export, erase):
        audit.command()(command)
    return audit
