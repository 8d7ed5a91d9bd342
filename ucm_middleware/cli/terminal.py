"""What all commands do alike: results on stdout, all else on stderr, and how they end.

The exit status is 0 when all is well, 1 when what was looked at is not, and 2 when it could not be looked at.
"""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ucm_middleware.audit.verification import Progress as VerificationProgress
from ucm_middleware.audit.verification import Stage
from ucm_middleware.errors import UserContextError

BAD: Final = 1
NOT_DONE: Final = 2

_STAGES: Final[Mapping[Stage, str]] = {"records": "records", "database": "index and database"}


def say(text: str, *, style: str | None = None, err: bool = False) -> None:
    """A line for a person, as it is: no markup, and no wrapping that would cut a path or a hash in two."""
    Console(stderr=err).print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def say_json(value: Mapping[str, object]) -> None:
    """A line for a program."""
    typer.echo(json.dumps(value))


@contextmanager
def refusals(*, as_json: bool = False) -> Generator[None]:
    """End the command with a message, and no traceback, where the package refuses."""
    try:
        yield
    except UserContextError as error:
        if as_json:
            say_json({"error": str(error)})
        else:
            say(f"error: {error}", style="red", err=True)
        raise typer.Exit(NOT_DONE) from None


@contextmanager
def counting_bar(what: str, total: int) -> Generator[Callable[[], None]]:
    """Show how many of something are done, where somebody is looking; what it gives is called for each."""
    with _bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress_bar() -> Generator[VerificationProgress]:
    """Show how far a verification has come, where somebody is looking; what it gives is told."""
    with _bar() as progress:
        task = progress.add_task("opening", total=None)

        def tell(stage: Stage, done: int, total: int) -> None:
            # SQLite does not say how much it has still to do: the bar pulses.
            progress.update(
                task, description=_STAGES[stage], completed=done, total=total if stage == "records" else None
            )

        yield tell
