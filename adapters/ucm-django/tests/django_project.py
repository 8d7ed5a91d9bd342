"""The project of ``django_notebook`` in this process, on the database of a test."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import django_notebook  # noqa: F401 - sets Django up, once for the process
from django.db import connections

from support.postgres import Login

ENGINE = "ucm_django.postgresql"
PLAIN = "django.db.backends.postgresql"
"""Django's own, which ties nothing to anybody."""


def database_settings(login: Login, **more: Any) -> dict[str, Any]:
    """What stands in ``DATABASES`` for a login."""
    return {
        "ENGINE": ENGINE,
        "NAME": login.dbname,
        "USER": login.user,
        "PASSWORD": login.password,
        "HOST": login.host,
        "PORT": login.port,
        **more,
    }


@contextmanager
def on_database(login: Login, **more: Any) -> Generator[None]:
    """Let the alias "default" lead to another database in this thread, and in those that begin in the block."""
    before = connections.settings["default"]
    configured = connections.configure_settings({"default": database_settings(login, **more)})
    connections.settings["default"] = configured["default"]
    _forget()
    try:
        yield
    finally:
        connections["default"].close()
        close_pool = getattr(connections["default"], "close_pool", None)
        if close_pool is not None:
            close_pool()
        connections.settings["default"] = before
        _forget()


def _forget() -> None:
    if hasattr(connections._connections, "default"):  # type: ignore[attr-defined]
        del connections["default"]


def fresh_connection() -> None:
    """Let this thread connect anew."""
    connections["default"].close()
