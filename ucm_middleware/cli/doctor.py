"""``ucm doctor``: examinations that adapters bring along, as entry points of the group ``ucm_middleware.doctors``."""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import typer
from typer.core import TyperGroup

from ucm_middleware.cli.terminal import NOT_DONE, say

GROUP: Final = "ucm_middleware.doctors"

_BROUGHT_BY: Final[Mapping[str, str]] = {"postgres": "ucm-postgres[doctor]"}


def make_doctor() -> typer.Typer:
    """The command, with one below it for each doctor that is installed."""
    return typer.Typer(
        cls=_Doctors,
        no_args_is_help=True,
        help=f"Examine what an adapter stands on. Adapters bring the doctors along: {_offers()}.",
        callback=_doctor,
    )


def _offers() -> str:
    # Without the name of the extra, whose brackets are markup here.
    return ", ".join(f"{name} comes with {package.partition('[')[0]}" for name, package in _BROUGHT_BY.items())


def _doctor() -> None:
    pass


class _Doctors(TyperGroup):
    # They are imported when asked for: none of the other commands pays for them.

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(_installed())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry_point = _installed().get(cmd_name)
        if entry_point is None:
            if cmd_name not in _BROUGHT_BY:
                return None  # it is said then that there is no such command
            say(f"there is no doctor called {cmd_name} here: pip install '{_BROUGHT_BY[cmd_name]}'", err=True)
            raise typer.Exit(NOT_DONE)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(cmd_name)(_loaded(entry_point))
        return typer.main.get_command(app)


def _installed() -> dict[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}


def _loaded(entry_point: EntryPoint) -> Callable[..., Any]:
    try:
        command: Callable[..., Any] = entry_point.load()
    except ImportError as error:
        # Of what is optional for the adapter, the doctor needs some.
        brought_by = "" if entry_point.dist is None else f": pip install '{entry_point.dist.name}[doctor]'"
        say(f"the doctor called {entry_point.name} cannot be imported ({error}){brought_by}", err=True)
        raise typer.Exit(NOT_DONE) from None
    return command
