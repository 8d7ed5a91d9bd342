"""What the tests of databases stand on is itself what they take it for."""

import asyncio
import gc
import socket
from contextlib import ExitStack, closing
from dataclasses import replace

import psycopg
import pytest

from support.pgbouncer import start_pgbouncer
from support.postgres import Database, PostgresServer
from support.processes import HOST
from support.tcp_proxy import TcpProxy, start_tcp_proxy


class TestDatabase:
    def test_its_app_login_sees_and_writes_only_the_rows_of_the_user_in_the_setting(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn) as connection:
            for user in "alice", "bob":
                connection.execute("select set_config('app.user_id', %s, true)", [user])
                connection.execute("insert into notes (body) values (%s)", [f"of {user}"])
            assert connection.execute("select user_id, body from notes").fetchall() == [("bob", "of bob")]
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                connection.execute("insert into notes (user_id, body) values ('alice', 'forged')")

    def test_its_logins_are_bound_by_policies(self, database: Database) -> None:
        with psycopg.connect(database.superuser.dsn) as connection:
            rows = connection.execute(
                "select rolsuper or rolbypassrls from pg_roles where rolname = any(%s)",
                [[database.owner.user, database.app.user]],
            ).fetchall()
        assert rows == [(False,), (False,)]

    def test_nothing_of_it_is_left(self, postgres_server: PostgresServer) -> None:
        with postgres_server.database() as fresh:
            fresh.login("more", "nologin")
            abandoned = psycopg.connect(fresh.app.dsn)
        with closing(abandoned), pytest.raises(psycopg.OperationalError):
            abandoned.execute("select 1")
        with psycopg.connect(postgres_server.superuser.dsn) as connection:
            question = "select count(*) from pg_roles where rolname like '%%' || %s"
            assert connection.execute(question, [fresh.name]).fetchone() == (0,)

    def test_a_wrong_password_is_refused(self, database: Database) -> None:
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(replace(database.app, password="wrong").dsn)


class TestProxy:
    def test_round_trips_are_what_the_client_waited_for(self, database: Database, postgres_proxy: TcpProxy) -> None:
        with psycopg.connect(database.app.at(postgres_proxy.port).dsn, autocommit=True) as connection:
            before = postgres_proxy.round_trips
            connection.execute("select 1")
            assert postgres_proxy.round_trips == before + 1
            connection.execute("select repeat('x', 1000000)").fetchone()  # in many pieces
            assert postgres_proxy.round_trips == before + 2
            with connection.pipeline():
                connection.execute("select 1")
                connection.execute("select 2")
            assert postgres_proxy.round_trips == before + 3
            assert postgres_proxy.open == postgres_proxy.accepted == 1

    async def test_an_answer_that_is_held_comes_when_released(
        self, database: Database, postgres_proxy: TcpProxy
    ) -> None:
        dsn = database.app.at(postgres_proxy.port).dsn
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            postgres_proxy.hold("replies", after=1)
            await connection.execute("select 1")
            asking = asyncio.create_task(connection.execute("select 2"))
            await postgres_proxy.until_held("replies")
            assert not asking.done()
            postgres_proxy.release("replies")
            assert await (await asking).fetchone() == (2,)

    def test_a_request_that_is_held_does_not_reach_the_server(
        self, database: Database, postgres_proxy: TcpProxy
    ) -> None:
        with closing(psycopg.connect(database.app.at(postgres_proxy.port).dsn)) as connection:
            postgres_proxy.hold("requests")
            connection.pgconn.send_query(b"select 1")
            postgres_proxy.wait_until_held("requests")
            with psycopg.connect(database.superuser.dsn) as watching:
                question = "select query from pg_stat_activity where pid = %s"
                row = watching.execute(question, [connection.info.backend_pid]).fetchone()
            assert row is not None
            assert "select 1" not in row[0]

    def test_what_is_cut_is_broken_and_a_new_connection_works(
        self, database: Database, postgres_proxy: TcpProxy
    ) -> None:
        dsn = database.app.at(postgres_proxy.port).dsn
        with psycopg.connect(dsn) as connection:
            postgres_proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select 1")
        postgres_proxy.refuse()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(dsn)
        postgres_proxy.refuse(False)
        psycopg.connect(dsn).close()

    @pytest.mark.parametrize("clients", [1, 2, 3])
    def test_who_connects_as_it_ends_is_closed_by_it(self, database: Database, clients: int) -> None:
        """Whatever is left open is named by the garbage collector, as a warning that fails the test."""
        for _ in range(30):
            with ExitStack() as connected, start_tcp_proxy(database.app.host, database.app.port) as proxy:
                for _ in range(clients):
                    connected.enter_context(socket.create_connection((HOST, proxy.port)))
            gc.collect()


class TestPgBouncer:
    def test_a_setting_of_one_client_is_the_next_ones(self, database: Database) -> None:
        with (
            start_pgbouncer(database) as pgbouncer,
            psycopg.connect(pgbouncer.login(database.app).dsn, autocommit=True) as alice,
            psycopg.connect(pgbouncer.login(database.app).dsn, autocommit=True) as bob,
        ):
            alice.execute("set app.user_id = 'alice'")
            assert bob.execute("show app.user_id").fetchone() == ("alice",)
