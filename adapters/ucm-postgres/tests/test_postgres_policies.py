"""The SQL that the helpers write, on a real server: what it lets through, and names that need quoting."""

from typing import Any

import psycopg
import pytest

from postgres_drivers import open_pool, refused
from support.contexts import running_as
from support.postgres import Database
from ucm_middleware import ConfigurationError
from ucm_postgres import Binding, policy_sql, setup_sql

TABLE, COLUMN = 'order"s; drop table notes', "Owner's"
HERS = "5f0f3a0e-52a5-4b0e-9a8e-0d6c5c4e1d11"
HIS = "6f0f3a0e-52a5-4b0e-9a8e-0d6c5c4e1d12"


async def test_a_table_with_any_name_and_ids_of_another_type(emptied: Database) -> None:
    where, whose = '"order""s; drop table notes"', '"Owner\'s"'
    emptied.execute(
        f"create table {where} ({whose} uuid, body text); grant select, insert, update on {where} to {{app}};"
        + policy_sql(TABLE, COLUMN, schema="public", column_type="uuid")
    )
    with psycopg.connect(emptied.superuser.dsn) as connection:
        connection.execute(f"insert into {where} values ('{HERS}', 'hers'), ('{HIS}', 'his')".encode())
    async with open_pool("psycopg", emptied.app) as pool:
        with running_as(pool.manager(), HERS):
            async with pool.plugin.transaction() as connection:
                assert await pool.run(connection, f"select body from {where}") == [("hers",)]
                await refused(pool, connection, f"insert into {where} values ('{HIS}', 'forged')")
                await refused(pool, connection, f"update {where} set {whose} = '{HIS}'")
        async with pool.borrow() as connection:
            assert await pool.run(connection, f"select body from {where}") == []
    # Its owner is bound too.
    with psycopg.connect(emptied.owner.dsn) as connection:
        assert connection.execute(f"select body from {where}".encode()).fetchall() == []
    emptied.execute(f"drop table {where}")


def test_the_policy_is_one_index_scan(emptied: Database) -> None:
    emptied.execute(
        "create table many (user_id text, n int); grant select on many to {app};"
        "insert into many select 'user' || n % 500, n from generate_series(1, 20000) n;" + policy_sql("many")
    )
    with psycopg.connect(emptied.owner.dsn, autocommit=True) as connection:
        connection.execute("analyze many")
    with psycopg.connect(emptied.app.dsn) as connection:
        connection.execute("select set_config('app.user_id', 'user7', true)")
        plan = "\n".join(line for (line,) in connection.execute("explain select * from many").fetchall())
        assert connection.execute("select count(*) from many").fetchone() == (40,)
    assert "InitPlan" in plan
    assert "many_user_id_idx" in plan
    emptied.execute("drop table many")


def test_a_binding_s_setting_is_what_the_policy_reads() -> None:
    assert "current_setting('shop.who', true)" in policy_sql("notes", binding=Binding(setting="shop.who"))
    assert "current_setting('shop.who', true)" in setup_sql("app", binding=Binding(setting="shop.who"))
    assert "(SELECT ucm.current_user_id())" in policy_sql("notes", binding=Binding(signed=True))
    assert 'TO "app", "a""b"' in setup_sql("app", 'a"b')


@pytest.mark.parametrize("bad", ["", "a\0b", "x" * 64, "ä" * 32])
def test_what_cannot_be_a_name_is_refused(bad: str) -> None:
    for field, options in (("table", {"table": bad}), ("column", {"column": bad}), ("schema", {"schema": bad})):
        given: dict[str, Any] = {"table": "notes", **options}
        with pytest.raises(ConfigurationError, match=f"{field} cannot be a name"):
            policy_sql(**given)
    with pytest.raises(ConfigurationError, match="roles cannot be a name"):
        setup_sql("app", bad)


@pytest.mark.parametrize("bad", ["", "text; drop table notes", "Text", "text)", "character(3)"])
def test_what_cannot_be_a_type_is_refused(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="column_type"):
        policy_sql("notes", column_type=bad)


def test_a_function_for_nobody_and_a_window_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="roles is empty"):
        setup_sql()
    with pytest.raises(ConfigurationError, match="window"):
        setup_sql("app", window=0)
