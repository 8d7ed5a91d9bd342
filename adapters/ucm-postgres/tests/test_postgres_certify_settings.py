"""Which settings the tap of ``ucm certify`` says are in force when a connection is used again."""

import asyncio

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg import Connection

from certify_support import tapping
from support.postgres import Database

ALICE = {"app.user_id": "alice"}

STAYS = {
    "set": ("set app.user_id = 'alice'", ALICE),
    "set to": ("SET SESSION app.user_id TO alice", ALICE),
    "quoted": ("""set "app"."user_id" = 'alice'""", ALICE),
    "behind a comment": ("/* ; */ select 1; -- set x\n set app.user_id = 'alice'", ALICE),
    "function": ("select set_config('app.user_id', 'alice', false)", ALICE),
    "inside": ("with one as (select set_config('app.user_id', 'alice', false)) select * from one", ALICE),
    "do": ("do $$ begin set app.user_id = 'alice'; end $$", ALICE),
    "committed": ("begin; set app.user_id = 'alice'; commit", ALICE),
    "search path": ("set search_path = alice, public", {"search_path": "alice, public"}),
    "schema": ("set schema 'alice'", {"search_path": "alice"}),
}
GOES = {
    "local": "begin; set local app.user_id = 'alice'; commit",
    "local function": "select set_config('app.user_id', 'alice', true)",
    "outside": "set local app.user_id = 'alice'",
    "rolled back": "begin; set app.user_id = 'alice'; rollback",
    "reset": "set app.user_id = 'alice'; reset app.user_id",
    "reset all": "set app.user_id = 'alice'; reset all",
    "emptied": "set app.user_id = 'alice'; set app.user_id = ''",
    "failed": "begin; set app.user_id = 'alice'; select 1/0",
    "role": "set role {app}; reset role",
}
OVERWRITTEN = {
    "set": "set app.user_id = 'bob'",
    "set local": "begin; set local app.user_id = 'bob'",
    "function": "begin; select set_config('app.user_id', 'bob', true), set_config('app.org', 'x', true) as org",
    "reset": "reset app.user_id",
    "reset all": "reset all",
    "discard": "discard all",
}


def run(connection: Connection, statements: str) -> None:
    """As one simple query."""
    try:
        connection.execute(statements.encode())
    except psycopg.errors.DivisionByZero:
        connection.rollback()


@pytest.mark.parametrize(("statements", "settings"), STAYS.values(), ids=STAYS)
def test_what_stays_is_in_force_for_the_next(database: Database, statements: str, settings: dict[str, str]) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, statements)
        assert tapped.seen == []
        run(connection, "select * from public.notes")
        assert tapped.seen == [settings]
        run(connection, "select * from public.notes")
        assert tapped.seen == [settings, settings]


@pytest.mark.parametrize("statements", GOES.values(), ids=GOES)
def test_what_goes_is_not(database: Database, statements: str) -> None:
    named = statements.replace("{app}", database.app.user)
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, named)
        run(connection, "select * from public.notes")
        assert tapped.seen == []
        run(connection, "set app.user_id = 'alice'")
        run(connection, "select * from public.notes")
        assert tapped.seen == [ALICE]


@pytest.mark.parametrize("first", OVERWRITTEN.values(), ids=OVERWRITTEN)
def test_what_is_overwritten_before_anything_else_is_not(database: Database, first: str) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, "set app.user_id = 'alice'")
        run(connection, first)
        run(connection, "select * from public.notes")
        assert [settings for settings in tapped.seen if settings.get("app.user_id") == "alice"] == []


def test_resetting_all_leaves_the_role_in_force(database: Database) -> None:
    role = database.login("other", "nologin").user
    database.execute(f"grant {role} to {{app}}", as_=database.superuser)
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, f"set role {role}; set app.user_id = 'alice'")
        run(connection, "reset all; select 1 + 1")
        assert tapped.seen == [{"role": role}]


def test_another_session_authorization_is_in_force(database: Database) -> None:
    with tapping(database.superuser.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, f"set session authorization {database.app.user}")
        run(connection, "select 1 + 1")
        run(connection, "reset session authorization")
        run(connection, "select 1 + 1")
        # The server tells of it, of the superuser's rights too.
        assert [settings.get("session_authorization") for settings in tapped.seen] == [database.app.user, None]


@pytest.mark.parametrize("prepare", [False, True])
def test_parameters_of_the_extended_protocol(database: Database, prepare: bool) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        statement = "select set_config(%s::text, %s, false)"
        connection.execute(statement, ["app.user_id", "alice"], prepare=prepare, binary=True)
        connection.execute("select body from notes where user_id = %s", ["alice"], prepare=prepare)
        assert tapped.seen == [ALICE]
        connection.execute(statement, ["app.user_id", "bob"], prepare=prepare)
        connection.execute("select body from notes where user_id = %s", ["alice"], prepare=prepare)
        assert tapped.seen == [ALICE, {"app.user_id": "bob"}]


async def test_a_transaction_is_one_use(database: Database) -> None:
    with tapping(database.app.dsn) as tapped:
        connection = await asyncpg.connect(tapped.dsn)
        await connection.execute("select set_config('app.user_id', $1, false)", "alice")
        async with connection.transaction():
            await connection.fetch("select * from public.notes")
            await connection.fetch("select * from public.notes")
        assert tapped.seen == [ALICE]
        await connection.close()
        assert (tapped.tap.connections, tapped.tap.unwatched) == (1, 0)


async def test_it_is_told_before_the_statement_is_run(database: Database) -> None:
    found = "select pid from pg_stat_activity where query = 'select pg_sleep(600)' and datname = %s"
    with tapping(database.app.dsn) as tapped:
        connection = await psycopg.AsyncConnection.connect(tapped.dsn, autocommit=True)
        await connection.execute("set app.user_id = 'alice'")
        running = asyncio.create_task(connection.execute("select pg_sleep(600)"))
        async with await psycopg.AsyncConnection.connect(database.superuser.dsn, autocommit=True) as other:
            while (row := await (await other.execute(found, [database.name])).fetchone()) is None:
                pass
            assert tapped.seen == [ALICE]
            await other.execute("select pg_terminate_backend(%s)", row)
        with pytest.raises(psycopg.errors.AdminShutdown):
            await running


def test_a_value_is_in_no_repr(database: Database) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        run(connection, "set app.user_id = 'alice'")
        run(connection, "select * from public.notes")
        assert "alice" not in repr(tapped.uses)
