"""What clients do comes out the same through the tap of ``ucm certify``, while it asks the server in between."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg import AsyncConnection
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from certify_support import tapping
from support.postgres import Database
from support.waiting import wait_until

SET = "set app.user_id = 'alice'"
BIG = 10 * 1024 * 1024

Exercise = Callable[[str], Awaitable[list[Any]]]


async def psycopg_sync(dsn: str) -> list[Any]:
    return await asyncio.to_thread(_psycopg_sync, dsn)


def _psycopg_sync(dsn: str) -> list[Any]:
    found: list[Any] = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        notices: list[str | None] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        connection.execute(SET)
        found.append(connection.execute("select %s::int, %s::text, null", [1, "ä"]).fetchall())
        for _ in range(7):  # from the sixth on it is prepared
            found.append(connection.execute("select n from generate_series(1, %s) n", [3]).fetchall())
        with pytest.raises(psycopg.errors.UndefinedTable) as wrong:
            connection.execute("select * from nowhere where x = %s", [1])
        found.append(str(wrong.value))
        with connection.transaction():
            connection.execute("create temporary table t (a int, b text)")
        with connection.cursor() as cursor:
            cursor.executemany("insert into t values (%s, %s)", [(n, "x" * n) for n in range(50)])
            with cursor.copy("copy t from stdin") as copy:
                for n in range(1000):
                    copy.write_row((n, "y" * 100))
            with cursor.copy("copy (select * from t order by a, b limit %s) to stdout", [500]) as copy:
                found.append(b"".join(map(bytes, copy)))
            with (
                pytest.raises(psycopg.errors.InvalidTextRepresentation),
                cursor.copy("copy t from stdin where a > 0") as copy,
            ):
                copy.write(b"no number\\tx\\n" * 10_000)
            with pytest.raises(ZeroDivisionError), cursor.copy("copy t from stdin") as copy:
                copy.write(b"1\\tx\\n")
                raise ZeroDivisionError  # psycopg ends the copy
        found.append(connection.execute("select count(*), sum(a) from t").fetchall())
        with connection.transaction(), connection.cursor("server side") as cursor:
            cursor.execute("select * from t order by a, b")
            found.append([cursor.fetchmany(10), cursor.fetchmany(10)])
        connection.execute("do $$ begin raise notice 'hello'; end $$")
        connection.execute("listen here")
        connection.execute("notify here, 'payload'")
        found.append([(each.channel, each.payload) for each in connection.notifies(timeout=5, stop_after=1)])
        found.append(notices)
        (big,) = connection.execute("select repeat('x', %s) || %s::text", [BIG, "y" * BIG]).fetchone() or ("",)
        found.append((len(big), big[-1]))
    return found


async def psycopg_pipeline(dsn: str) -> list[Any]:
    found: list[Any] = []
    async with await AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(SET)
        async with connection.pipeline() as pipeline:
            cursors = [await connection.execute("select %s::int", [n]) for n in range(100)]
            await pipeline.sync()
            cursors += [await connection.execute("select %s::text", ["z" * n * 1000]) for n in range(100)]
            found.extend([await cursor.fetchall() for cursor in cursors])
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.pipeline() as pipeline:
                await connection.execute("select 1")
                await connection.execute("select 1 / %s", [0])
                await connection.execute("select 2")
                await pipeline.sync()
        async with connection.pipeline(), connection.transaction():
            await connection.execute("select set_config('app.user_id', 'bob', true)")
            cursor = await connection.execute("select current_setting('app.user_id')")
            found.append(await cursor.fetchall())
        found.append(await (await connection.execute("select current_setting('app.user_id')")).fetchall())
        # One after another, with no time in between for the tap's questions.
        for n in range(200):
            found.append(await (await connection.execute("select %s::int", [n])).fetchone())
    return found


async def asyncpg_cached(dsn: str) -> list[Any]:
    return await _asyncpg(dsn)


async def asyncpg_unnamed(dsn: str) -> list[Any]:
    """Its statements have no name, and are run in another round trip than they are prepared in."""
    return await _asyncpg(dsn, statement_cache_size=0)


async def _asyncpg(dsn: str, **options: Any) -> list[Any]:
    found: list[Any] = []
    connection = await asyncpg.connect(dsn, **options)
    await connection.execute(SET)
    for n in range(10):
        found.append([tuple(row) for row in await connection.fetch("select $1::int, $2::text", n, "b" * n)])
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetchval("select 1 / $1::int", 0)
    await connection.execute("create temporary table t (a int, b text)")
    await connection.copy_records_to_table("t", records=[(n, "c" * 50) for n in range(5000)])
    with pytest.raises(asyncpg.PostgresError):
        await connection.copy_to_table("t", source=io.BytesIO(b"no number\\tx\\n" * 50_000))
    out = io.BytesIO()
    await connection.copy_from_query("select * from t order by a limit $1", 100, output=out)
    found.append(out.getvalue())
    statement = await connection.prepare("select sum(a) from t where a < $1")
    found.append([await statement.fetchval(n) for n in (10, 100)])
    async with connection.transaction():
        found.append([tuple(row) async for row in connection.cursor("select * from t order by a")][:100])
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    await connection.add_listener("here", lambda *event: heard.put_nowait((event[2], event[3])))
    await connection.execute("select pg_notify('here', 'one')")
    found.append(await asyncio.wait_for(heard.get(), 10))
    found.append(len(await connection.fetchval("select $1 || repeat('x', $2)", "y" * BIG, BIG)))
    with pytest.raises(TimeoutError):  # it cancels
        await connection.execute("select pg_sleep(600)", timeout=0.1)
    found.append(await connection.fetchval("select 42"))
    await connection.reset()
    found.append(await connection.fetchval("select current_setting('app.user_id', true)"))
    await connection.close()
    return found


async def sqlalchemy_psycopg(dsn: str) -> list[Any]:
    return await _sqlalchemy(dsn.replace("postgresql://", "postgresql+psycopg://"))


async def sqlalchemy_asyncpg(dsn: str) -> list[Any]:
    return await _sqlalchemy(dsn.replace("postgresql://", "postgresql+asyncpg://"))


async def _sqlalchemy(url: str) -> list[Any]:
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True)
    found: list[Any] = []
    for n in range(5):
        async with engine.begin() as connection:
            await connection.execute(text("select set_config('app.user_id', :user, false)"), {"user": f"u{n}"})
            rows = await connection.execute(text("select :n + generate_series(1, 3)"), {"n": n})
            found.append([tuple(row) for row in rows])
    async with engine.connect() as connection:
        found.append([tuple(row) for row in await connection.execute(text("select current_setting('app.user_id')"))])
    await engine.dispose()
    return found


ALL = [psycopg_sync, psycopg_pipeline, asyncpg_cached, asyncpg_unnamed, sqlalchemy_psycopg, sqlalchemy_asyncpg]


@pytest.mark.parametrize("exercise", ALL)
async def test_all_is_the_same_as_without(database: Database, exercise: Exercise) -> None:
    without = await exercise(database.app.dsn)
    with tapping(database.app.dsn) as tapped:
        assert await exercise(tapped.dsn) == without
        assert tapped.uses
        assert tapped.tap.unwatched == 0


async def test_a_statement_is_cancelled(database: Database) -> None:
    with tapping(database.app.dsn) as tapped:
        async with await AsyncConnection.connect(tapped.dsn, autocommit=True) as connection:
            await connection.execute(SET)
            running = asyncio.create_task(connection.execute("select pg_sleep(600)"))
            while not running.done():
                await connection.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                await running
            # It may have hit the tap's own question.
            for _ in range(20):
                await connection.execute("select 1")
                await connection.cancel_safe()
        assert tapped.tap.unwatched == 0


async def test_a_hundred_connections_at_once(database: Database) -> None:
    async def work(dsn: str, user: str) -> list[Any]:
        connection = await asyncpg.connect(dsn)
        await connection.execute("select set_config('app.user_id', $1, false)", user)
        found = [await connection.fetchval("select current_setting('app.user_id')") for _ in range(10)]
        await connection.close()
        return found

    users = [f"user-{n}" for n in range(100)]
    with tapping(database.app.dsn) as tapped:
        assert await asyncio.gather(*(work(tapped.dsn, user) for user in users)) == [[user] * 10 for user in users]
        assert (tapped.tap.connections, tapped.tap.unwatched) == (100, 0)
        seen = [settings["app.user_id"] for settings in tapped.seen]
        assert sorted(seen) == sorted(user for user in users for _ in range(10))


def _sessions(database: Database) -> int:
    with psycopg.connect(database.superuser.dsn) as connection:
        counting = "select count(*) from pg_stat_activity where usename = %s"
        (count,) = connection.execute(counting, [database.app.user]).fetchone() or (0,)
        return int(count)


def test_who_hangs_up_is_gone_from_the_server(database: Database) -> None:
    with tapping(database.app.dsn) as tapped:
        connection = psycopg.connect(tapped.dsn, autocommit=True)
        connection.execute(SET)
        assert _sessions(database) == 1
        connection.close()
        wait_until(lambda: _sessions(database) == 0, "the server has no session of it")


def test_an_end_that_the_server_makes_comes_through_with_its_reason(database: Database) -> None:
    with (
        tapping(database.app.dsn) as tapped,
        closing(psycopg.connect(tapped.dsn, autocommit=True)) as connection,
    ):
        connection.execute(SET)
        with psycopg.connect(database.superuser.dsn, autocommit=True) as other:
            other.execute("select pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("select 1")


def test_the_end_of_the_tap_is_the_end_of_its_connections(database: Database) -> None:
    with tapping(database.app.dsn) as tapped:
        connection = psycopg.connect(tapped.dsn, autocommit=True)
    with closing(connection), pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    wait_until(lambda: _sessions(database) == 0, "the server has no session of it")


def test_a_wrong_password_is_refused_by_the_server(database: Database) -> None:
    with (
        tapping(database.app.dsn.replace(database.app.password, "wrong")) as tapped,
        pytest.raises(psycopg.OperationalError, match="password authentication failed"),
    ):
        psycopg.connect(tapped.dsn)


def test_what_cannot_be_followed_passes_and_is_counted(database: Database) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        for n in range(101):
            connection.execute(f"set app.name_{n} = 'alice'".encode())
        assert connection.execute("select current_setting('app.name_100')").fetchall() == [("alice",)]
        assert (tapped.tap.connections, tapped.tap.unwatched) == (1, 1)
        assert tapped.seen == []


def test_the_question_leaves_the_client_s_unnamed_statement_alone(database: Database) -> None:
    with tapping(database.app.dsn) as tapped, psycopg.connect(tapped.dsn, autocommit=True) as connection:
        connection.execute(SET)
        connection.pgconn.prepare(b"", b"select 42")
        assert connection.pgconn.exec_prepared(b"", None).get_value(0, 0) == b"42"
        assert tapped.uses
