"""What becomes of the driver's connections: pools, threads that end, cursors that outlive them, poolers."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.db import InterfaceError, OperationalError, close_old_connections, connection, transaction
from django.test import override_settings

from django_notebook import bodies, owners, write
from django_project import ENGINE, PLAIN, on_database, seed
from support.contexts import events, running_as
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import UserContextManager

POOL_OF_ONE: dict[str, Any] = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1, "timeout": 10}}}


def in_thread(work: Callable[[], Any]) -> Any:
    """Do it in a thread that ends after it."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


# A cursor on the server cannot be closed once its connection is somebody else's, and psycopg warns that it was not.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cursor_does_not_outlive_its_connection(database: Database, manager: UserContextManager) -> None:
    with on_database(database.app, **POOL_OF_ONE):
        with running_as(manager, "alice"):
            write("hers")
            cursor = connection.cursor()
            cursor.execute("SELECT body FROM notes")
            server_side = connection.chunked_cursor()
            server_side.execute("SELECT body FROM notes")
            assert server_side.fetchone() == ("hers",)
            connection.close()  # back into the pool

        def as_bob() -> None:
            with running_as(manager, "bob"), transaction.atomic():
                write("his")
                lent.set()
                assert used.wait(10)
                assert bodies() == ["his"]
            connection.close()

        lent, used = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as executor:
            bob = executor.submit(as_bob)
            assert lent.wait(10)
            with running_as(manager, "alice"):
                for attempt in (
                    lambda: cursor.execute("SELECT body FROM notes"),
                    lambda: cursor.executemany("INSERT INTO notes (user_id) VALUES (%s)", [("alice",)]),
                    lambda: cursor.fetchall(),
                    lambda: list(cursor),
                    lambda: cursor.callproc("now"),
                    lambda: cursor.copy("COPY notes TO STDOUT"),
                    lambda: server_side.fetchone(),
                ):
                    with pytest.raises(InterfaceError, match="closed or given back"):
                        attempt()
                cursor.close()
                server_side.close()
            used.set()
            bob.result()


def test_a_thread_that_ends_gives_its_connection_back(database: Database, manager: UserContextManager) -> None:
    def leave_open() -> None:
        with running_as(manager, "alice"):
            transaction.set_autocommit(False)
            write("left open")

    with on_database(database.app, **POOL_OF_ONE):
        in_thread(leave_open)  # nobody sends request_finished in it
        with running_as(manager, "bob"):
            assert bodies() == []
    with psycopg.connect(database.superuser.dsn, autocommit=True) as admin:
        open_ones = "select count(*) from pg_stat_activity where datname = current_database() and usename like 'app%'"
        with on_database(database.app, CONN_MAX_AGE=None):
            in_thread(leave_open)
            wait_until(lambda: admin.execute(open_ones).fetchone() == (0,), "its own connection is closed")


@pytest.mark.parametrize("options", [{"CONN_MAX_AGE": None}, POOL_OF_ONE], ids=["persistent", "pool of one"])
def test_after_a_killed_backend_the_next_user_has_a_connection(
    database: Database, manager: UserContextManager, options: dict[str, Any]
) -> None:
    with on_database(database.app, **options):
        with running_as(manager, "alice"), pytest.raises(OperationalError), transaction.atomic():
            write("hers")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                [pid] = cursor.fetchone()
            with psycopg.connect(database.superuser.dsn, autocommit=True) as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
            bodies()
        close_old_connections()  # as Django does before and after each request
        with running_as(manager, "bob"):
            write("his")
            assert bodies() == ["his"]
        with running_as(manager, "alice"):
            assert bodies() == []
        connection.close()
    told = [event for event in events(manager, "alice", "transaction") if event["phase"] != "begin"]
    assert told[0]["phase"] in ("rollback", "unknown")
    assert told[0]["outcome"] == "failed"


def in_atomic(lose: Callable[[], None]) -> None:
    with transaction.atomic():
        write("hers")
        lose()


def by_hand(lose: Callable[[], None]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        write("hers")
        lose()
        cursor.execute("COMMIT")


def by_itself(lose: Callable[[], None]) -> None:
    lose()
    write("hers")


def in_the_middle(lose: Callable[[], None]) -> None:
    with transaction.atomic():
        write("hers")
        lose()
        write("hers, too")


def in_the_middle_by_hand(lose: Callable[[], None]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        lose()
        write("hers")


@pytest.mark.parametrize(
    ("work", "phase"),
    [
        (in_atomic, "unknown"),
        (by_hand, "unknown"),
        (by_itself, "unknown"),
        (in_the_middle, "rollback"),
        (in_the_middle_by_hand, "rollback"),
    ],
)
def test_a_commit_whose_answer_is_lost_is_on_record_as_unknown(
    database: Database,
    manager: UserContextManager,
    postgres_proxy: TcpProxy,
    work: Callable[[Callable[[], None]], None],
    phase: str,
) -> None:
    def lose_the_next_answer() -> None:
        postgres_proxy.hold("replies")

    def run() -> None:
        with running_as(manager, "alice"):
            connection.ensure_connection()
            with pytest.raises(OperationalError):
                work(lose_the_next_answer)
        connection.close()

    with on_database(database.app.at(postgres_proxy.port)), ThreadPoolExecutor(1) as executor:
        running = executor.submit(run)
        postgres_proxy.wait_until_held("replies")
        postgres_proxy.cut()
        postgres_proxy.release("replies")  # for the connection that Django makes after that
        running.result()
    begin, end = events(manager, "alice", "transaction")
    assert (begin["phase"], begin["bound_by"]) == ("begin", "app.user_id")
    assert (end["phase"], end["outcome"]) == (phase, "failed")


def test_the_project_s_own_reset_comes_first(database: Database, manager: UserContextManager) -> None:
    calls: list[str] = []

    def own(raw: Any) -> None:
        calls.append(raw.execute("SELECT current_setting('app.user_id', true)").fetchone()[0])
        raw.rollback()

    options = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1, "reset": own}}}
    with on_database(database.app, TIME_ZONE="Asia/Tokyo", **options):
        with running_as(manager, "alice"), connection.cursor() as cursor:
            cursor.execute("SET app.user_id = 'alice'")
        connection.close()
        with running_as(manager, "bob"), connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('TimeZone')")
            assert cursor.fetchone() == ("Asia/Tokyo",)
    assert calls[0] == "alice"


@pytest.mark.parametrize(("engine", "reset"), [(PLAIN, "change"), (ENGINE, "begin")])
def test_behind_a_pooler_in_transaction_mode(
    database: Database, manager: UserContextManager, engine: str, reset: str
) -> None:
    seed(database, "alice", "bob")

    def as_alice() -> None:
        with running_as(manager, "alice"), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.user_id', 'alice', false)")
            cursor.execute("SELECT set_config('statement_timeout', '4321', false)")
        connection.close()

    def as_bob() -> tuple[Any, ...]:
        with running_as(manager, "bob"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('statement_timeout'), current_setting('TimeZone')")
            seen = (*cursor.fetchone(), *owners())
        connection.close()
        return seen

    def alone() -> list[str]:
        with running_as(manager, "bob"):
            return owners()

    unbound = ["default"] if engine == PLAIN else []
    with (
        start_pgbouncer(database) as pgbouncer,
        override_settings(UCM_RESET=reset, UCM_UNBOUND_DATABASES=unbound),
        on_database(pgbouncer.login(database.app), ENGINE=engine, TIME_ZONE="Asia/Tokyo"),
    ):
        in_thread(as_bob)
        in_thread(as_alice)
        if engine == PLAIN:
            assert in_thread(as_bob) == ("4321ms", "Asia/Tokyo", "alice")
        else:
            assert in_thread(as_bob) == ("0", "Asia/Tokyo", "bob")
            assert in_thread(alone) == ["bob"]
