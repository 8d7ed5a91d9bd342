"""A binding and its statement that are sent together: one transaction, behind which nothing is sent."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from django.db import IntegrityError, ProgrammingError, connection, transaction
from django.test import override_settings

from django_notebook import bodies, owners, write
from django_project import all_notes, on_database, seed
from support.contexts import events, running_as
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from ucm_middleware import UserContextManager

_MARKS = """
create table marks (note bigint references notes (id) deferrable initially deferred);
grant insert on marks to public;
"""


@pytest.fixture(params=["change", "begin"])
def reset(request: pytest.FixtureRequest, notebook: Database) -> Iterator[None]:
    """Both ways of resetting, one after the other."""
    with override_settings(UCM_RESET=request.param):
        yield


def mark(note: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO marks VALUES (%s)", [note])


@pytest.mark.usefixtures("reset")
def test_no_flush_is_sent(notebook: Database, manager: UserContextManager, tmp_path: Path) -> None:
    """PgBouncer takes a server connection for one that reaches it outside of a transaction, and keeps it."""
    seed(notebook, "alice")
    trace = tmp_path / "trace"
    with running_as(manager, "alice"), trace.open("wb") as file:
        bodies()
        connection.connection.pgconn.trace(file.fileno())
        assert owners() == ["alice"]
        with pytest.raises(ProgrammingError), connection.cursor() as cursor:
            cursor.execute("SELECT nothing FROM nowhere")
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("COMMIT")
        assert owners() == ["alice"]
        connection.connection.pgconn.untrace()
    messages = [line.split(b"\t")[1:4] for line in trace.read_bytes().splitlines()]
    sent = [kind.strip() for who, _, kind in messages if who == b"F"]
    assert sent.count(b"Sync") == 4
    assert b"Flush" not in sent


def test_a_client_that_rests_keeps_no_server_connection_of_pgbouncer(
    database: Database, manager: UserContextManager
) -> None:
    seed(database, "alice")
    with (
        start_pgbouncer(database) as pgbouncer,
        override_settings(UCM_RESET="begin"),
        on_database(pgbouncer.login(database.app)),
        running_as(manager, "alice"),
        psycopg.connect(pgbouncer.login(database.app).dsn, autocommit=True) as other,
    ):
        for _ in range(500):  # what is sent behind a transaction mostly comes before PgBouncer knows of its end
            assert owners() == ["alice"]
            assert other.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.usefixtures("reset")
def test_a_transaction_that_fails_in_its_commit_raises_why(notebook: Database, manager: UserContextManager) -> None:
    notebook.execute(_MARKS, as_=notebook.owner)
    with running_as(manager, "alice"):
        for _ in range(20):  # the server may answer at once, or in time
            with pytest.raises(IntegrityError, match="foreign key"):
                mark(0)
        with pytest.raises(IntegrityError, match="foreign key"), transaction.atomic():
            mark(0)
        write("kept")
        ends = [each for each in events(manager, "alice", "transaction") if each["phase"] != "begin"]
    assert [(each["phase"], each.get("error")) for each in ends] == [
        *[("rollback", "IntegrityError")] * 21,
        ("commit", None),
    ]
    assert all_notes(notebook) == [("alice", "kept")]
