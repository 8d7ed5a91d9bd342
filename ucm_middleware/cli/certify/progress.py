"""How far a run has come, for whoever looks at a terminal."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from ucm_middleware.certify.coverage import Coverage


class Bar:
    """A bar that goes by the time, with the number of requests and of findings. It is told by the run."""

    __slots__ = ("_progress", "_task")

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, what: str, seconds: float | None) -> None:
        """Something has begun."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=seconds, said="")

    def done(self, coverage: "Coverage", findings: int) -> None:
        """Steps were taken."""
        if self._task is not None:
            elapsed = self._progress.tasks[-1].elapsed
            said = f"{coverage.requests + coverage.messages:,} requests and messages, {findings} findings"
            self._progress.update(self._task, completed=elapsed or 0, said=said)


@contextmanager
def bar() -> Generator[Bar]:
    """Show it, where somebody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress)
