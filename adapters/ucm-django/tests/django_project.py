"""The project of ``django_notebook`` in this process, on the database of a test."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db import connection, connections

import django_notebook  # noqa: F401 - sets Django up, once for the process
from support.postgres import Database, Login
from support.waiting import wait_until

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
        _close_pool(connections["default"])
        connections.settings["default"] = before
        _forget()


def _close_pool(wrapper: Any) -> None:
    pool = getattr(wrapper, "pool", None)
    if pool is None:
        return

    def all_back() -> bool:
        stats = pool.get_stats()
        return bool(stats.get("pool_available", 0) == stats["pool_size"])

    # What is on its way back when a pool closes is not closed by it.
    wait_until(all_back, "all connections are back in the pool")
    wrapper.close_pool()


def _forget() -> None:
    if hasattr(connections._connections, "default"):  # type: ignore[attr-defined]
        del connections["default"]


def fresh_connection() -> None:
    """Let this thread connect anew."""
    connections["default"].close()


def seed(database: Database, *users: str) -> None:
    """A note of each user's, which says so."""
    for user in users:
        database.execute(
            f"insert into notes (user_id, body) values ('{user}', 'secret of {user}')", as_=database.superuser
        )


def all_notes(database: Database) -> list[tuple[str, str]]:
    """Everybody's notes, as owner and body."""
    with psycopg.connect(database.superuser.dsn) as admin:
        return admin.execute("select user_id, body from notes order by id").fetchall()


def told() -> str:
    """Who the database takes a statement for."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('app.user_id', true)")
        (value,) = cursor.fetchone()
    return str(value)
