"""The command, its options, and how it ends."""

import asyncio
import dataclasses
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ucm_middleware.cli.certify.progress import Bar, bar
from ucm_middleware.cli.terminal import BAD, NOT_DONE, refusals, say
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.testing.server import ServerKind

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Options, Result

_NEEDS: Final = frozenset({"h2", "httptools", "hypothesis", "requests", "schemathesis", "uvicorn", "websockets"})


def certify(
    app: Annotated[str, typer.Argument(help="The application, as module:name.", metavar="APP")],
    users: Annotated[
        str | None,
        typer.Option(help="Who takes part: a TOML file or module:function. Without: visitors without credentials."),
    ] = None,
    server: Annotated[str, typer.Option(help="uvicorn, hypercorn or granian.")] = "uvicorn",
    factory: Annotated[bool, typer.Option("--factory", help="APP is called, and returns the application.")] = False,
    app_dir: Annotated[Path, typer.Option(help="Where APP is looked for; the server's working directory.")] = Path(),
    seconds: Annotated[float, typer.Option(help="How long it is tried.", min=1)] = 20.0,
    shorten: Annotated[float, typer.Option(help="Seconds to look for the shortest steps in.", min=0)] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Takes the steps of an earlier run again.", min=0)] = None,
    first: Annotated[bool, typer.Option("--first", help="Stop at the first finding.")] = False,
    schema: Annotated[
        str | None, typer.Option(help="The OpenAPI schema: a file, or a path of the application's.")
    ] = None,
    database_variable: Annotated[
        str | None,
        typer.Option(
            help="The variable of the environment with the DSN of APP's PostgreSQL: its settings are looked at."
        ),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help='A route that is not tried: "DELETE /all".')] = None,
    with_ucm: Annotated[
        bool, typer.Option("--with-ucm", help="Try it again in UserContextMiddleware, and compare.")
    ] = False,
) -> None:
    """Run an application on a real server, as several users, and try to make it mix them up.

    It sends real requests, those that delete included: give the application data that it may lose. The exit status is
    0 when nothing of a user's reached another, 1 when it did, 2 when the application could not be tried.
    """
    with refusals(), _installed():
        from ucm_middleware.certify.cast import strangers
        from ucm_middleware.certify.castfile import read_cast
        from ucm_middleware.certify.certifying import Options

        sys.path.insert(0, str(app_dir.resolve()))  # as the server does, for a function of --users
        options = Options(
            app=_name(app),
            cast=strangers() if users is None else read_cast(users),
            kind=_kind(server),
            factory=factory,
            app_dir=app_dir.resolve(),
            seconds=seconds,
            shorten=shorten,
            first=first,
            schema=schema,
            skip=tuple(skip or ()),
            database=database_variable,
        )
        if seed is not None:
            options = dataclasses.replace(options, seed=seed)
        results = _run(options, twice=with_ucm)
        if any(result.shown for result in results[:1]):
            raise typer.Exit(BAD)
        if not results[0].coverage.covered:
            raise typer.Exit(NOT_DONE)


def _run(options: "Options", *, twice: bool) -> "list[Result]":
    from ucm_middleware.certify.certifying import certify as run
    from ucm_middleware.certify.server import SubjectError

    async def run_all(shown: Bar) -> "list[Result]":
        return [await run(options, shown, with_ucm=with_ucm) for with_ucm in ((False, True) if twice else (False,))]

    with bar() as shown:
        try:
            return asyncio.run(run_all(shown))
        except SubjectError as error:
            if error.output:
                say(error.output, style="dim", err=True)
            raise


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
