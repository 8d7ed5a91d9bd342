"""The command: what it is told, and how it ends."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ucm_middleware.cli.certify.progress import Bar, bar
from ucm_middleware.cli.certify.signals import ended_by_signals
from ucm_middleware.cli.certify.writing import Wanted, report_of, write_all
from ucm_middleware.cli.terminal import BAD, NOT_DONE, refusals, say
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.testing.server import ServerKind

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Options, Result

_NEEDS: Final = frozenset({"h2", "httptools", "hypothesis", "requests", "schemathesis", "uvicorn", "websockets"})

_TRY = "What is tried"
_REPORT = "What is written"


def certify(
    app: Annotated[str, typer.Argument(help="The application, as module:name.", metavar="APP")],
    users: Annotated[
        str | None,
        typer.Option(help="Who takes part: a TOML file or module:function. Without: visitors without credentials."),
    ] = None,
    server: Annotated[str, typer.Option(help="uvicorn, hypercorn or granian.")] = "uvicorn",
    factory: Annotated[bool, typer.Option("--factory", help="APP is called, and returns the application.")] = False,
    app_dir: Annotated[Path, typer.Option(help="Where APP is looked for; the server's working directory.")] = Path(),
    schema: Annotated[
        str | None,
        typer.Option(help="The OpenAPI schema: a file, or a path of the application's.", rich_help_panel=_TRY),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help='A route that is not tried: "DELETE /all".', rich_help_panel=_TRY)
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long it is tried.", min=1, rich_help_panel=_TRY)] = 20.0,
    shorten: Annotated[
        float, typer.Option(help="Seconds to look for the shortest steps in.", min=0, rich_help_panel=_TRY)
    ] = 30.0,
    seed: Annotated[
        int | None, typer.Option(help="Takes the steps of an earlier run again.", min=0, rich_help_panel=_TRY)
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Stop at the first finding.", rich_help_panel=_TRY)] = False,
    database_variable: Annotated[
        str | None,
        typer.Option(
            help="The variable of the environment with the DSN of APP's PostgreSQL: its settings are looked at.",
            rich_help_panel=_TRY,
        ),
    ] = None,
    with_ucm: Annotated[
        bool,
        typer.Option("--with-ucm", help="Try it again in UserContextMiddleware, and compare.", rich_help_panel=_TRY),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="The report, for a program.", rich_help_panel=_REPORT)] = None,
    junit: Annotated[Path | None, typer.Option(help="The report as JUnit XML.", rich_help_panel=_REPORT)] = None,
    html: Annotated[Path | None, typer.Option(help="The report as one page.", rich_help_panel=_REPORT)] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Findings that are known, and fail no run.", rich_help_panel=_REPORT)
    ] = None,
    update_baseline: Annotated[
        bool,
        typer.Option("--update-baseline", help="Add what is found to the --baseline.", rich_help_panel=_REPORT),
    ] = False,
) -> None:
    """Run an application on a real server, as several users, and try to make it mix them up.

    It sends real requests, those that delete included: give the application data that it may lose. The exit status is
    0 when nothing of a user's reached another, or nothing that the baseline does not know; 1 when something did; 2 when
    the application could not be tried, or no route of it answered two users.
    """
    with refusals(), _installed():
        from ucm_middleware.certify.cast import strangers
        from ucm_middleware.certify.castfile import read_cast
        from ucm_middleware.certify.certifying import Options, any_seed

        wanted = Wanted(json, junit, html, baseline, update_baseline)
        wanted.check()  # before anything is run
        known = wanted.known()
        where = app_dir.resolve()
        sys.path.insert(0, str(where))  # as the server does, for a function of --users
        options = Options(
            app=_name(app),
            cast=strangers() if users is None else read_cast(users),
            kind=_kind(server),
            factory=factory,
            app_dir=where,
            seconds=seconds,
            shorten=shorten,
            first=first,
            seed=any_seed() if seed is None else seed,
            schema=schema,
            skip=tuple(skip or ()),
            database=database_variable,
        )
        results = _run(options, twice=with_ucm)
        report = report_of(results, users, known)
        write_all(report, wanted)
        if report.has_new and not update_baseline:
            raise typer.Exit(BAD)
        if not results[0].coverage.covered:
            raise typer.Exit(NOT_DONE)


def _run(options: "Options", *, twice: bool) -> "list[Result]":
    from ucm_middleware.certify.certifying import certify as run
    from ucm_middleware.certify.report.saying import Saying
    from ucm_middleware.certify.server import SubjectError

    async def run_all(shown: Bar) -> "list[Result]":
        return [await run(options, shown, with_ucm=with_ucm) for with_ucm in ((False, True) if twice else (False,))]

    with bar() as shown:
        try:
            return ended_by_signals(run_all(shown))
        except SubjectError as error:
            saying = Saying(options.cast, error.given)  # applications write credentials too
            for line in error.output.splitlines():
                say(saying.text(line), style="dim", err=True)
            raise ConfigurationError(saying.text(str(error))) from None


def _kind(server: str) -> ServerKind:
    from ucm_middleware.certify.server import SERVERS

    for kind in SERVERS:
        if server == kind:
            return kind
    raise ConfigurationError(f"--server must be one of {', '.join(SERVERS)}, not {server!r}")


def _name(app: str) -> str:
    module, _, name = app.partition(":")
    if not module or not name or module.endswith(".py"):
        raise ConfigurationError(f"APP must be module:name, such as shop.main:app, not {app!r}")
    return app


@contextmanager
def _installed() -> Generator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDS:
            raise
        raise ConfigurationError(
            f"ucm certify needs {missing}, which is not installed: pip install 'ucm-middleware[certify]'"
        ) from None
