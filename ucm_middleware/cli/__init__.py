"""The command ``ucm``."""

import sys


def main() -> None:
    """The entry point. Needs the extra ``audit``, and says so where it is not installed."""
    try:
        from ucm_middleware.cli.app import make_app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "typer"}:
            raise
        sys.stderr.write(f"ucm needs {missing}, which is not installed: pip install 'ucm-middleware[audit]'\n")
        sys.exit(2)
    make_app()()
