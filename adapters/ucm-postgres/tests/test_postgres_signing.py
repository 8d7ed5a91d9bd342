"""The hardened mode: what arbitrary SQL inside of alice's transaction can see of bob's, without it and with it."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import DRIVERS, FORGED, INSERT, Pool, crowd, of, open_pool, refused
from support.contexts import running_as
from support.postgres import Database, PostgresServer
from ucm_middleware import ConfigurationError, UserContextManager
from ucm_postgres import PURPOSE, Binding, install_keys, policy_sql, setup_sql
from ucm_postgres.signing import SigningKey, signed

FIRST, SECOND = "first-6Yb0qk3Zt8Wm2Xc9Vn5Ls7Rj1Kd", "second-9Qw4Er7Ty2Ui5Op8As1Df3Gh6"
READ = "select user_id, body from notes order by id"


@dataclass
class World:
    """A database, with policies that go by the setting as it is, or by what is signed."""

    database: Database
    signed: bool

    @property
    def binding(self) -> Binding:
        return Binding(signed=self.signed)


def make_world(server: PostgresServer, is_signed: bool) -> Iterator[World]:
    with server.database(notes=False) as database:
        binding = Binding(signed=is_signed)
        user = "ucm.current_user_id()" if is_signed else "nullif(current_setting('app.user_id', true), '')"
        if is_signed:
            database.execute(f"grant create on database {database.name} to {{owner}}", as_=database.superuser)
            database.execute(setup_sql(database.app.user, binding=binding))
            install(database, manager_with(FIRST))
        database.execute(
            f"create table notes (id bigint generated always as identity, user_id text default {user}, body text);"
            "grant select, insert, update, delete on notes to {app};" + policy_sql("notes", binding=binding)
        )
        yield World(database, is_signed)


@pytest.fixture(scope="module")
def open_world(postgres_server: PostgresServer) -> Iterator[World]:
    yield from make_world(postgres_server, False)


@pytest.fixture(scope="module")
def signed_world(postgres_server: PostgresServer) -> Iterator[World]:
    yield from make_world(postgres_server, True)


def manager_with(secret: str, previous: str | None = None) -> UserContextManager:
    return UserContextManager(secret=secret, previous_secrets=[previous] if previous else None)


def install(database: Database, manager: UserContextManager) -> None:
    with psycopg.connect(database.owner.dsn) as connection:
        install_keys(connection, manager.subkeys(PURPOSE))


@pytest.fixture(params=DRIVERS)
async def pool(request: pytest.FixtureRequest, signed_world: World) -> AsyncIterator[Pool]:
    signed_world.database.execute("truncate notes")
    async with open_pool(request.param, signed_world.database.app, binding=signed_world.binding) as pool:
        yield pool


def key() -> bytes:
    return manager_with(FIRST).subkeys(PURPOSE)[0]


def now(shift: int = 0) -> int:
    return int(time.time()) + shift


def tampered(value: str) -> str:
    """Alice's value with bob for the user."""
    head, _, _ = value.rpartition(".")
    return f"{head}.bob"


# What SQL can say in alice's transaction to become bob, with the value that she has for a parameter.
ATTACKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "his id": ("select set_config('app.user_id', %s, true)", lambda own: "bob"),
    "his id with her MAC": ("select set_config('app.user_id', %s, true)", tampered),
    "his id for the session": ("select set_config('app.user_id', %s, false)", lambda own: "bob"),
    "a value of his that is over": (
        "select set_config('app.user_id', %s, true)",
        lambda own: signed(key(), "bob", now(-120)),
    ),
    "a value of his that is not yet": (
        "select set_config('app.user_id', %s, true)",
        lambda own: signed(key(), "bob", now(120)),
    ),
    "a key of her own": ("select set_config('app.user_id', %s, true)", lambda own: signed(b"k" * 32, "bob", now())),
    "a key of her own by its name": (
        "select set_config('app.user_id', %s, true)",
        lambda own: signed(b"k" * 32, "bob", now()).replace(
            SigningKey.from_subkey(b"k" * 32).fingerprint, SigningKey.from_subkey(key()).fingerprint
        ),
    ),
    "no MAC": (
        "select set_config('app.user_id', %s, true)",
        lambda own: ".".join([*own.split(".")[:3], "", "bob"]),
    ),
    "nothing": ("select set_config('app.user_id', %s, true)", lambda own: ""),
}
PLAIN_ATTACKS = [
    "set local app.user_id = 'bob'",
    "set app.user_id = 'bob'",
    "reset app.user_id; set app.user_id = 'bob'",
    "reset all; set app.user_id = 'bob'",
    "set role none; set app.user_id = 'bob'",
    "set session authorization default; set app.user_id = 'bob'",
    "set row_security = off",
    "create or replace function pg_temp.sha256(bytea) returns bytea language sql as $$select ''::bytea$$;"  # noqa: ISC004
    "set search_path = pg_temp, pg_catalog, public; set app.user_id = 'bob'",
    "create temporary table signing_keys (fingerprint text, inner_key bytea, outer_key bytea); set app.user_id = 'bob'",
]
NO_SUCH_STATEMENT = (psycopg.errors.InvalidSqlStatementName, asyncpg.InvalidSQLStatementNameError)
SEES_NOTHING = psycopg.errors.InsufficientPrivilege  # what row_security = off says of a table with policies


async def attack(world: World, statement: str, forge: Callable[[str], str] | None) -> set[str]:
    """Whose rows alice sees after it. Bob's are there."""
    world.database.execute("truncate notes")
    async with open_pool("psycopg", world.database.app, binding=world.binding) as pool:
        manager = pool.manager(secret=FIRST)
        for user in ("alice", "bob"):
            with running_as(manager, user):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, f"of {user}")
        with running_as(manager, "alice"):
            seen: set[str] = set()
            try:
                async with pool.plugin.transaction() as connection:
                    if forge is None:
                        await pool.run(connection, statement)
                    else:
                        [(own,)] = await pool.run(connection, "select current_setting('app.user_id')")
                        await pool.run(connection, statement, forge(own))
                    seen = {user for user, _ in await pool.run(connection, READ)}
            except SEES_NOTHING:
                return set()
            except psycopg.ProgrammingError as error:
                if error.sqlstate is not None:
                    raise  # else it is for the end of the block, after she has seen what she has
            return seen


@pytest.mark.parametrize("statement", PLAIN_ATTACKS)
async def test_sql_in_a_transaction_does_not_become_somebody_else(signed_world: World, statement: str) -> None:
    assert "bob" not in await attack(signed_world, statement, None)


@pytest.mark.parametrize("what", ATTACKS)
async def test_a_forged_value_is_nobody(signed_world: World, what: str) -> None:
    assert await attack(signed_world, *ATTACKS[what]) == set()


@pytest.mark.parametrize("statement", [each for each in PLAIN_ATTACKS if "app.user_id" in each])
async def test_without_signatures_it_does(open_world: World, statement: str) -> None:
    assert await attack(open_world, statement, None) == {"bob"}


async def test_without_signatures_an_id_is_enough(open_world: World) -> None:
    assert await attack(open_world, *ATTACKS["his id"]) == {"bob"}


async def test_functions_of_her_own_do_not_stand_in_for_the_server_s(signed_world: World) -> None:
    database = signed_world.database
    database.execute("create schema mine authorization {app}", as_=database.superuser)
    database.execute(
        "grant usage on schema mine to public;"
        "create function mine.sha256(bytea) returns bytea language sql as $$select ''::bytea$$",
        as_=database.app,
    )
    take_over = (
        "select set_config('search_path', 'mine, pg_catalog, public', true), set_config('app.user_id', %s, true)"
    )
    assert await attack(signed_world, take_over, tampered) == set()


async def test_a_stolen_value_is_good_for_its_window(signed_world: World) -> None:
    """What the mode does not answer, and the README says so."""
    steal = "select set_config('app.user_id', %s, true)"
    assert await attack(signed_world, steal, lambda own: signed(key(), "bob", now())) == {"bob"}


class TestASignedUser:
    async def test_has_their_rows_and_no_others(self, pool: Pool) -> None:
        manager = pool.manager(secret=FIRST)
        for user in ("alice", "bob", "o'brien . 1.2.3", "Zoë 用户"):
            with running_as(manager, user):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, f"of {user}")
                    assert of(user, await pool.run(connection, READ)) == [f"of {user}"]

    async def test_cannot_write_for_another(self, pool: Pool) -> None:
        with running_as(pool.manager(secret=FIRST), "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "hers")
                for forged in FORGED:
                    await refused(pool, connection, forged, "bob")

    async def test_is_looked_up_once_a_query(self, pool: Pool, signed_world: World) -> None:
        with running_as(pool.manager(secret=FIRST), "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, "insert into notes (body) select 'x' from generate_series(1, 500)")
                plan = await pool.run(connection, "explain (analyze, costs off, timing off) select * from notes")
        [once] = [line for (line,) in plan if "InitPlan" in line or "current_user_id" in line][:1]
        assert "InitPlan" in once
        assert any("(actual rows=1.00 loops=1)" in line for (line,) in plan), plan

    async def test_of_an_unknown_secret_is_nobody(self, pool: Pool) -> None:
        with running_as(pool.manager(secret=SECOND), "alice"):
            async with pool.plugin.transaction() as connection:
                assert await pool.run(connection, "select ucm.current_user_id()") == [(None,)]
                assert await pool.run(connection, READ) == []


class TestTheWindow:
    @pytest.mark.parametrize(("shift", "user"), [(-50, "alice"), (50, "alice"), (-70, None), (70, None)])
    def test_is_a_minute_each_way(self, signed_world: World, shift: int, user: str | None) -> None:
        with psycopg.connect(signed_world.database.app.dsn) as connection:
            connection.execute("select set_config('app.user_id', %s, true)", [signed(key(), "alice", now(shift))])
            assert connection.execute("select ucm.current_user_id()").fetchone() == (user,)

    def test_is_about_the_beginning_of_the_transaction(self, signed_world: World) -> None:
        """Long ones hold: at the second look the value is older than a minute."""
        with psycopg.connect(signed_world.database.app.dsn) as connection:
            connection.execute("select set_config('app.user_id', %s, true)", [signed(key(), "alice", now(-57))])
            assert connection.execute("select ucm.current_user_id()").fetchone() == ("alice",)
            connection.execute("select pg_sleep(3.2)")
            assert connection.execute("select ucm.current_user_id()").fetchone() == ("alice",)


class TestARotation:
    async def test_serves_both_secrets_meanwhile_and_then_one(self, pool: Pool, signed_world: World) -> None:
        async def who(manager: UserContextManager) -> Any:
            with running_as(manager, "alice"):
                async with pool.plugin.transaction() as connection:
                    return (await pool.run(connection, "select ucm.current_user_id()"))[0][0]

        old, new = pool.manager(secret=FIRST), pool.manager(secret=SECOND, previous_secrets=[FIRST])
        try:
            assert (await who(old), await who(new)) == ("alice", None)
            install(signed_world.database, new)
            assert (await who(old), await who(new)) == ("alice", "alice")
            install(signed_world.database, pool.manager(secret=SECOND))
            assert (await who(old), await who(new)) == (None, "alice")
        finally:
            install(signed_world.database, old)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_statement_of_the_drivers_that_sql_has_replaced_is_gone_for_the_next_borrower(
    signed_world: World, driver: str
) -> None:
    """Bob's transactions would run hers, which tells her his value: the binding itself is prepared by the drivers."""
    async with open_pool(driver, signed_world.database.app, binding=signed_world.binding) as pool:
        manager = pool.manager(secret=FIRST)
        with running_as(manager, "alice"):
            for _ in range(8):  # so often is it before psycopg prepares it
                async with pool.plugin.transaction():
                    pass
            async with pool.plugin.transaction() as connection:
                [(name,)] = await pool.run(
                    connection,
                    "select name from pg_prepared_statements where starts_with(statement, 'SELECT set_config')",
                )
                await connection.execute(f'deallocate "{name}"')
                await connection.execute(
                    f'prepare "{name}" (text, text) as select set_config($1, $2, true)'
                    " from (select set_config('my.stolen', $2, true)) as told"
                )
        with running_as(manager, "bob"):
            with pytest.raises(NO_SUCH_STATEMENT):
                async with pool.plugin.transaction():
                    pass
            async with pool.plugin.transaction() as connection:
                assert await pool.run(connection, "select ucm.current_user_id()") == [("bob",)]
                [(stolen,)] = await pool.run(connection, "select current_setting('my.stolen', true)")
                assert not stolen


@pytest.mark.parametrize("off", ["standard_conforming_strings", "escape_string_warning"])
async def test_how_a_session_reads_strings_makes_no_difference(signed_world: World, off: str) -> None:
    with psycopg.connect(signed_world.database.app.dsn) as connection:
        connection.execute(f"set {off} = off".encode())
        value = signed(key(), "alice", now())
        for said, user in (
            (value, "alice"),
            (value.replace(".", "x", 1), None),
            (value.replace(".alice", "xalice"), None),
        ):
            connection.execute("select set_config('app.user_id', %s, true)", [said])
            assert connection.execute("select ucm.current_user_id()").fetchone() == (user,)


class TestTheKeys:
    @pytest.mark.parametrize(
        "statement",
        [
            "select * from ucm.signing_keys",
            "insert into ucm.signing_keys values ('0', '', '')",
            "delete from ucm.signing_keys",
            "create function ucm.mine() returns int language sql as 'select 1'",
            "create or replace function ucm.current_user_id() returns text language sql as $$select 'bob'$$",
            "drop schema ucm cascade",
        ],
    )
    def test_are_out_of_reach_of_the_application(self, signed_world: World, statement: str) -> None:
        refused = pytest.raises(psycopg.errors.InsufficientPrivilege)
        with psycopg.connect(signed_world.database.app.dsn) as connection, refused:
            connection.execute(statement.encode())

    def test_are_no_part_of_what_is_shown(self, signed_world: World) -> None:
        subkey = key()
        assert subkey.hex() not in repr(SigningKey.from_subkey(subkey))
        with psycopg.connect(signed_world.database.owner.dsn) as connection:
            [(stored,)] = connection.execute("select fingerprint from ucm.signing_keys").fetchall()
        assert repr(SigningKey.from_subkey(subkey)) == f"<SigningKey {stored}>"

    def test_of_another_role_cannot_ask_for_the_user(self, signed_world: World) -> None:
        stranger = signed_world.database.login("stranger")
        refused = pytest.raises(psycopg.errors.InsufficientPrivilege)
        with psycopg.connect(stranger.dsn) as connection, refused:
            connection.execute("select ucm.current_user_id()")
        with psycopg.connect(signed_world.database.owner.dsn) as connection:
            may = "select has_function_privilege(%s, 'ucm.current_user_id()', 'execute')"
            assert connection.execute(may, [stranger.user]).fetchone() == (False,)
            assert connection.execute(may, [signed_world.database.app.user]).fetchone() == (True,)

    def test_none_is_refused(self, signed_world: World) -> None:
        refused = pytest.raises(ConfigurationError, match="subkeys is empty")
        with psycopg.connect(signed_world.database.owner.dsn) as connection, refused:
            install_keys(connection, ())


async def test_a_crowd_keeps_apart(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_SECRET", FIRST)
    await crowd(pool, users=10, rounds=2)
