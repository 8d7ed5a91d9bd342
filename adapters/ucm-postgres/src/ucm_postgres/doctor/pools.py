"""Whether a pool gives a connection back as it was, found out by trying.

The doctor borrows a connection, sets what a careless application would, returns it, and looks at what the next borrower
finds. It undoes what is left.
"""

import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

from ucm_middleware import ConfigurationError
from ucm_postgres.binding import Binding
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.pool_doors import PoolDoor, open_async_pool, open_pool, sync_engine
from ucm_postgres.reset import RESET

_FIRST: Final = 30.0
"""Seconds to wait for a connection, which may have to be made."""

_NEXT: Final = 2.0
"""The same for one that has just been given back."""

_REMEDIES: Final = {
    "psycopg_pool": "make the pool with reset=ucm_postgres.psycopg.reset, or that of ucm_postgres.psycopg_threads",
    "asyncpg": "make the pool with reset=ucm_postgres.asyncpg.reset",
    "sqlalchemy": "let ucm_sqlalchemy have the engine, or run the SQL in a listener for its event 'reset'",
}


def examine_pool(pool: object, binding: Binding | None = None) -> tuple[Finding, ...]:
    """What a borrower of this pool leaves to the next: a ``psycopg_pool.ConnectionPool`` or an SQLAlchemy ``Engine``.

    For the start of an application, when nobody borrows yet: what is tried out may reach another borrower otherwise. It
    takes two connections' turns, and a temporary table where the login may make one.

    Raises ConfigurationError for what is no such pool, and what the pool and its driver raise.
    """
    door = open_pool(pool)
    if door is None:
        raise ConfigurationError(
            f"the pool is a {_name(pool)}; give a psycopg_pool.ConnectionPool or an SQLAlchemy Engine here, and an "
            "asynchronous pool to examine_async_pool"
        )
    return _now(_examine(door, pool, binding or Binding()))


async def examine_async_pool(pool: object, binding: Binding | None = None) -> tuple[Finding, ...]:
    """The same for a ``psycopg_pool.AsyncConnectionPool``, a pool of asyncpg or an SQLAlchemy ``AsyncEngine``."""
    door = open_async_pool(pool)
    if door is not None:
        return await _examine(door, pool, binding or Binding())
    engine = sync_engine(pool)
    if engine is None:
        raise ConfigurationError(
            f"the pool is a {_name(pool)}; give a psycopg_pool.AsyncConnectionPool, a pool of asyncpg or an SQLAlchemy "
            "AsyncEngine here, and another pool to examine_pool"
        )
    from sqlalchemy.util import greenlet_spawn

    return await greenlet_spawn(_now, _examine(engine, pool, binding or Binding()))


@dataclass(frozen=True, slots=True)
class _State:
    process: int
    setting: str
    role: str
    has_table: bool
    may_make_tables: bool


async def _examine(pool: PoolDoor, shown: object, binding: Binding) -> tuple[Finding, ...]:
    mark = f"doctor_{secrets.token_hex(8)}"
    state = (
        f"select pg_backend_pid(), coalesce(current_setting('{binding.setting}', true), ''), current_setting('role'),"
        f" to_regclass('pg_temp.{mark}') is not null, has_database_privilege(current_database(), 'TEMP')"
        " and current_setting('transaction_read_only') = 'off'"
    )
    connection = await pool.take(_FIRST)
    try:
        before = _State(*await pool.run(connection, state))
        await pool.run(connection, f"select set_config('{binding.setting}', '{mark}', false)")
        await pool.run(connection, "select set_config('role', session_user, false)")
        if before.may_make_tables:
            await pool.run(connection, f"create temporary table {mark} ()")
    finally:
        await pool.give_back(connection)
    held: list[Any] = []
    try:
        after = await _seen_again(pool, held, state, before.process)
        if after is None:
            return ()
        await _undo(pool, held[-1], binding, before, mark)
        return _judged(after, before, mark, shown)
    finally:
        for connection in held:
            await pool.give_back(connection)


async def _seen_again(pool: PoolDoor, held: list[Any], state: str, process: int) -> _State | None:
    # Those that come in its stead are kept meanwhile, or they would come again.
    for _ in range(pool.limit()):
        try:
            held.append(await pool.take(_NEXT))
        except TimeoutError:
            return None
        found = _State(*await pool.run(held[-1], state))
        if found.process == process:
            return found
    return None  # the pool has closed it


def _judged(after: _State, before: _State, mark: str, shown: object) -> tuple[Finding, ...]:
    left: list[str] = []
    if after.setting == mark:
        left.append("SET")
    if after.role != before.role:
        left.append("SET ROLE")
    if after.has_table:
        left.append("temporary tables")
    if not left:
        return ()
    problem = f"what one borrower leaves is there for the next: {', '.join(left)}; {_REMEDIES[_library(shown)]}"
    return (Finding("pool", "serious", _name(shown), problem, "; ".join(RESET) + ";"),)


async def _undo(pool: PoolDoor, connection: Any, binding: Binding, before: _State, mark: str) -> None:
    # Nothing else: what the application has set on its connections stays.
    await pool.run(connection, f"select set_config('role', '{_escaped(before.role)}', false)")
    await pool.run(connection, f"select set_config('{binding.setting}', '{_escaped(before.setting)}', false)")
    if before.may_make_tables:
        await pool.run(connection, f"drop table if exists pg_temp.{mark}")


def _now(coroutine: Coroutine[Any, Any, tuple[Finding, ...]]) -> tuple[Finding, ...]:
    # It waits for nothing that is asynchronous, and so is done at once.
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: tuple[Finding, ...] = done.value
        return result
    coroutine.close()
    raise RuntimeError("an asynchronous pool was taken for another")


def _escaped(text: str) -> str:
    return text.replace("'", "''")


def _library(pool: object) -> str:
    return type(pool).__module__.partition(".")[0]


def _name(pool: object) -> str:
    return f"{_library(pool)}.{type(pool).__name__}"
