"""What is refused before it reaches the server, and what fails there."""

import tempfile
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import override_settings

from django_notebook import bodies, owners, write
from django_project import all_notes, fresh_connection, on_database, seed, told
from support.contexts import running_as, visitor
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)


@pytest.mark.parametrize("in_atomic", [False, True])
def test_no_statement_reaches_the_server_for_nobody(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager, in_atomic: bool
) -> None:
    closed = manager.create_isolated_context("alice")
    with on_database(database.app.at(postgres_proxy.port)):
        with running_as(manager, "alice"):
            write("hers")
        before = postgres_proxy.round_trips

        def ask() -> None:
            if in_atomic:
                with transaction.atomic():
                    bodies()
            else:
                bodies()

        with pytest.raises(ContextNotFoundError):
            ask()
        with managed_user_context(visitor(manager)), pytest.raises(UnauthenticatedError):
            ask()
        with managed_user_context(closed):
            closed.close()
            with pytest.raises(ContextClosedError):
                ask()
        assert postgres_proxy.round_trips == before
        with running_as(manager, "alice"):
            assert bodies() == ["hers"]  # and nothing is left of it


def test_what_the_driver_is_given_directly_is_tied_too(notebook: Database, manager: UserContextManager) -> None:
    seed(notebook, "bob")
    notebook.execute(
        "create function whoami(text) returns text language sql as $$ select current_setting('app.user_id', true) $$"
    )
    with connection.cursor() as cursor:
        with pytest.raises(ContextNotFoundError):
            cursor.callproc("whoami", ["x"])
        with pytest.raises(ContextNotFoundError), cursor.copy("COPY notes TO STDOUT"):
            pass
    with running_as(manager, "alice"), connection.cursor() as cursor:
        cursor.callproc("whoami", ["x"])
        assert cursor.fetchone() == ("alice",)
        for name in ("copy", "stream"):
            with pytest.raises(TransactionManagementError, match=r"transaction\.atomic"):
                getattr(cursor, name)("COPY notes TO STDOUT")
        with transaction.atomic():
            with cursor.copy("COPY (SELECT current_setting('app.user_id'), count(*) FROM notes) TO STDOUT") as copy:
                assert list(copy.rows()) == [("alice", "0")]
            assert list(cursor.stream("SELECT user_id FROM notes")) == []
        with connection.chunked_cursor() as chunked:
            chunked.execute("SELECT current_setting('app.user_id', true)")
            assert chunked.fetchone() == ("alice",)


def test_a_transaction_on_the_driver_s_own_connection_is_refused(
    notebook: Database, manager: UserContextManager
) -> None:
    with running_as(manager, "alice"):
        connection.ensure_connection()
        connection.connection.execute("BEGIN")
        with pytest.raises(ConfigurationError, match="driver's own connection"):
            bodies()
        connection.connection.execute("ROLLBACK")
        assert bodies() == []


@pytest.mark.parametrize(
    "user", ["o'brien", 'a"b', "back\\slash", "%s", "$1; drop table notes", pytest.param("é" * 100, id="long")]
)
def test_a_user_id_is_a_value_and_never_sql(notebook: Database, manager: UserContextManager, user: str) -> None:
    with running_as(manager, user):
        write("mine")
        assert told() == user
        with tempfile.TemporaryFile("w+") as trace:
            connection.connection.pgconn.trace(trace.fileno())
            for work in (owners, transaction.atomic(owners)):
                assert work() == [user]
            connection.connection.pgconn.untrace()
            trace.seek(0)
            told_by = [line for line in trace.read().splitlines() if "set_config" in line and "Parse" in line]
        assert len(told_by) == 2
        assert all("set_config($1, $2, true)" in line for line in told_by)


def test_other_plugins_tie_the_connection_too_and_an_error_of_theirs_lets_nothing_through(
    notebook: Database,
) -> None:
    class Plugin:
        fails = False

        @hookimpl
        def ucm_bind_session(self, context: UserExecutionContext, session: Any) -> None:
            if self.fails:
                raise OSError("no")
            with session.cursor() as cursor:
                cursor.execute("SELECT set_config('app.tenant', %s, true)", [context.user_id + "'s"])

    plugin = Plugin()
    manager = UserContextManager(plugins=[plugin])
    with running_as(manager, "alice"):
        for block in (transaction.atomic, transaction.atomic):
            with block(), connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('app.tenant')")
                assert cursor.fetchone() == ("alice's",)
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('app.tenant')")
            assert cursor.fetchone() == ("alice's",)
        plugin.fails = True
        with pytest.raises(OSError, match="no"):
            write("not written")
        with transaction.atomic():
            with pytest.raises(OSError, match="no"):
                write("not written")
            with pytest.raises(TransactionManagementError, match="could not be tied"):
                write("not written either")
    assert all_notes(notebook) == []


def test_each_transaction_may_take_on_a_role(database: Database, manager: UserContextManager) -> None:
    reader = database.login("reader", "nologin")
    database.execute(f'grant select on notes to "{reader.user}"')
    database.execute(f'grant "{reader.user}" to {{app}}', as_=database.superuser)
    with override_settings(UCM_BINDING={"role": reader.user}), on_database(database.app), running_as(manager, "alice"):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_user, session_user")
            assert cursor.fetchone() == (reader.user, database.app.user)
        with pytest.raises(DatabaseError, match="permission denied"):
            write("it may only read")
    with override_settings(UCM_BINDING={"role": "nobody_knows"}), on_database(database.app):
        for work in (bodies, transaction.atomic()(bodies)):
            with running_as(manager, "alice"), pytest.raises(DatabaseError, match="nobody_knows"):
                work()
    fresh_connection()


def test_a_database_that_is_read_only_or_gone_says_so(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager
) -> None:
    with on_database(database.app.at(postgres_proxy.port)), running_as(manager, "alice"):
        with transaction.atomic(), connection.cursor() as cursor, pytest.raises(DatabaseError, match="read-only"):
            cursor.execute("SET TRANSACTION READ ONLY")
            write("refused")
        for work in (bodies, transaction.atomic()(bodies)):
            assert bodies() == []
            postgres_proxy.cut()
            with pytest.raises(DatabaseError):
                work()
            connection.close()
        postgres_proxy.refuse()
        with pytest.raises(DatabaseError):
            bodies()
        postgres_proxy.refuse(False)
        assert bodies() == []
    assert all_notes(database) == []
