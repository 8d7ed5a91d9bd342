"""What of a project's settings would leave statements untied, told by ``manage.py check`` and at each connection."""

from collections.abc import Callable, Sequence
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error
from django.db import connections

from ucm_django import conf
from ucm_django.wrapper import BoundToUser
from ucm_middleware import ConfigurationError

BIND_USER = "ucm_django.middleware.BindUserMiddleware"
_AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"


def check_settings(*_: object, **__: object) -> list[CheckMessage]:
    """For Django's system checks. E001: a setting is wrong. E002: a database is untied. E003: the order of middleware.
    W001: a database is tied, and declared unbound.
    """
    found = [
        Error(str(error), id="ucm_django.E001")
        for error in map(_error_of, (conf.binding, conf.unbound_databases, conf.anonymous, conf.reset))
        if error is not None
    ]
    if found:
        return list(found)
    return [*_check_databases(), *_check_middleware(settings.MIDDLEWARE)]


def refuse_untied(connection: Any) -> None:
    """At each connection, since a server is started without the system checks. Closes the connection, and raises
    ConfigurationError, where it is neither tied to users nor declared unbound.
    """
    alias = connection.alias
    if alias not in connections.settings or isinstance(connection, BoundToUser) or alias in conf.unbound_databases():
        return
    connection.close()
    raise ConfigurationError(_untied(alias, connection.vendor))


def _check_databases() -> list[CheckMessage]:
    unbound = conf.unbound_databases()
    found: list[CheckMessage] = []
    for alias in connections:
        is_tied = isinstance(connections[alias], BoundToUser)
        if not is_tied and alias not in unbound:
            found.append(Error(_untied(alias, connections[alias].vendor), id="ucm_django.E002"))
        elif is_tied and alias in unbound:
            found.append(
                checks.Warning(
                    f"DATABASES[{alias!r}] is in UCM_UNBOUND_DATABASES: its statements are tied to nobody, whatever "
                    "its ENGINE is",
                    hint="Keep it for migrations, and away from the code that serves users.",
                    id="ucm_django.W001",
                )
            )
    return found


def _check_middleware(names: Sequence[str]) -> list[CheckMessage]:
    if BIND_USER not in names:
        return []
    if _AUTHENTICATION in names and names.index(_AUTHENTICATION) < names.index(BIND_USER):
        return []
    return [
        Error(
            f"MIDDLEWARE has {BIND_USER} without {_AUTHENTICATION} before it",
            hint="It reads request.user: put it right after.",
            id="ucm_django.E003",
        )
    ]


def _untied(alias: str, vendor: str) -> str:
    if vendor == "postgresql":
        return (
            f"nothing ties the statements of DATABASES[{alias!r}] to users; let its ENGINE be {conf.ENGINE!r}, or name "
            "the alias in UCM_UNBOUND_DATABASES"
        )
    return (
        f"DATABASES[{alias!r}] is on {vendor}, which ucm-django cannot tie to users: there are no row policies; use "
        "PostgreSQL for what belongs to users, and name this alias in UCM_UNBOUND_DATABASES"
    )


def _error_of(read: Callable[[], object]) -> ConfigurationError | None:
    try:
        read()
    except ConfigurationError as error:
        return error
    return None
