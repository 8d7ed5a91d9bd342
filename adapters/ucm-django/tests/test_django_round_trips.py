"""What binding costs in round trips, counted by a proxy between Django and the server."""

from collections.abc import Callable

import pytest
from django.db import connection, transaction
from django.test import override_settings

from django_notebook import Note, owners
from django_project import PLAIN, on_database
from support.contexts import running_as
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import (
    UserContextManager,
)


def alone() -> None:
    owners()


def in_atomic() -> None:
    with transaction.atomic():
        owners()
        owners()


def many() -> None:
    with connection.cursor() as cursor:
        cursor.executemany("SELECT %s", [(1,), (2,)])


def two_in_one() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1; SELECT 2")


def on_the_server() -> None:
    list(Note.objects.iterator(chunk_size=10))


@pytest.mark.parametrize(("work", "more"), [(alone, 0), (in_atomic, 0), (many, 3), (two_in_one, 3), (on_the_server, 3)])
def test_what_binding_costs_in_round_trips(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager, work: Callable[[], None], more: int
) -> None:
    def round_trips() -> int:
        work()
        before = postgres_proxy.round_trips
        work()
        return postgres_proxy.round_trips - before

    login = database.app.at(postgres_proxy.port)
    with override_settings(UCM_UNBOUND_DATABASES=["default"]), on_database(login, ENGINE=PLAIN):
        unbound = round_trips()
    with on_database(login), running_as(manager, "alice"):
        bound = round_trips()
    assert bound - unbound == more


def test_a_connection_that_changes_hands_costs_one(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager
) -> None:
    with on_database(database.app.at(postgres_proxy.port)):
        for user, more in (("alice", None), ("alice", 0), ("bob", 1), ("bob", 0)):
            before = postgres_proxy.round_trips
            with running_as(manager, user):
                owners()
            assert more is None or postgres_proxy.round_trips - before == 1 + more
