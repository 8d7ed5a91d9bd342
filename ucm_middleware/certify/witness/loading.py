"""The application, as ``module:name`` names it."""

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, Final, cast

from starlette.types import ASGIApp

from ucm_middleware.errors import ConfigurationError

_MOST_LAYERS: Final = 20
"""Middlewares around the application, each with what it wraps as ``app``."""


def load(where: str, *, factory: bool) -> ASGIApp:
    """Import it, and with ``factory`` call it. Raises what the import raises, ConfigurationError for a wrong name."""
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{module} has no {name!r}")
        found = getattr(found, part)
    if factory:
        found = found()
    if not callable(found):
        raise ConfigurationError(f"{where} is a {type(found).__name__}, and no ASGI application")
    if not factory and inspect.isfunction(found) and not inspect.signature(found).parameters:
        raise ConfigurationError(f"{where} takes no arguments: it may be a factory; say so with --factory")
    return cast("ASGIApp", found)


def routes_of(app: Any) -> Iterable[tuple[str, tuple[str, ...], bool]]:
    """Path, methods and whether it is a WebSocket, of each route of a router like Starlette's; of others none.

    Middlewares around it are looked through.
    """
    for _ in range(_MOST_LAYERS):
        if hasattr(app, "routes") or not hasattr(app, "app"):
            break
        app = app.app
    try:
        yield from [*_routes("", getattr(app, "routes", ()))]
    except Exception:  # noqa: BLE001 - what is called so may be anything; the application is run all the same
        return


def _routes(prefix: str, routes: Iterable[Any]) -> Iterable[tuple[str, tuple[str, ...], bool]]:
    for route in routes:
        path = f"{prefix}{getattr(route, 'path', '')}"
        below = getattr(route, "routes", None)
        if below:
            yield from _routes(path, below)
        elif not _is_documentation(route) and hasattr(route, "endpoint"):
            methods = getattr(route, "methods", None)
            yield path, tuple(sorted(methods or ())), methods is None and "WebSocket" in type(route).__name__


def _is_documentation(route: Any) -> bool:
    return getattr(route, "include_in_schema", True) is False
