"""The commands, put together."""

import typer

from ucm_middleware.cli.audit import make_audit
from ucm_middleware.cli.certify import certify
from ucm_middleware.cli.doctor import make_doctor


def make_app() -> typer.Typer:
    """The whole command."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_ucm)
    app.add_typer(make_audit(), name="audit")
    app.add_typer(make_doctor(), name="doctor")
    app.command("certify")(certify)
    return app


def _ucm() -> None:
    """Look after what ucm-middleware keeps, and try applications."""
