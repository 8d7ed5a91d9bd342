"""Pools of several libraries, used alike. None of the libraries is imported: who has such a pool has it."""

from typing import Any, Protocol


class PoolDoor(Protocol):
    """A pool. Where it is not asynchronous, its methods never wait for anything that is."""

    def limit(self) -> int:
        """How many connections there may be to look through."""
        ...

    async def take(self, patience: float) -> Any:
        """A connection. Raises TimeoutError when there is none in so many seconds."""
        ...

    async def run(self, connection: Any, statement: str) -> tuple[Any, ...]:
        """The first row of what a statement gives, if any, committed."""
        ...

    async def give_back(self, connection: Any) -> None:
        """Return a connection."""
        ...


def open_pool(pool: Any) -> PoolDoor | None:
    """A pool for code without a loop; None for what is no such pool that is known."""
    kinds = _kinds(pool)
    if ("psycopg_pool", "ConnectionPool") in kinds:
        return _Psycopg(pool)
    return _Engine(pool) if ("sqlalchemy", "Engine") in kinds else None


def open_async_pool(pool: Any) -> PoolDoor | None:
    """An asynchronous pool; None for what is none that is known."""
    kinds = _kinds(pool)
    if ("psycopg_pool", "AsyncConnectionPool") in kinds:
        return _AsyncPsycopg(pool)
    return _Asyncpg(pool) if ("asyncpg", "Pool") in kinds else None


def sync_engine(pool: Any) -> PoolDoor | None:
    """The engine inside of SQLAlchemy's asynchronous one, to be used in a greenlet of SQLAlchemy's."""
    return _Engine(pool.sync_engine) if ("sqlalchemy", "AsyncEngine") in _kinds(pool) else None


def _kinds(pool: object) -> set[tuple[str, str]]:
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(pool).__mro__}


class _Psycopg:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def limit(self) -> int:
        return int(self._pool.max_size)

    async def take(self, patience: float) -> Any:
        from psycopg_pool import PoolTimeout

        try:
            return self._pool.getconn(timeout=patience)
        except PoolTimeout as error:
            raise TimeoutError(str(error)) from None

    async def run(self, connection: Any, statement: str) -> tuple[Any, ...]:
        from psycopg.rows import tuple_row

        with connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else ()
        if not connection.autocommit:
            connection.commit()
        return tuple(row or ())

    async def give_back(self, connection: Any) -> None:
        self._pool.putconn(connection)


class _AsyncPsycopg:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def limit(self) -> int:
        return int(self._pool.max_size)

    async def take(self, patience: float) -> Any:
        from psycopg_pool import PoolTimeout

        try:
            return await self._pool.getconn(timeout=patience)
        except PoolTimeout as error:
            raise TimeoutError(str(error)) from None

    async def run(self, connection: Any, statement: str) -> tuple[Any, ...]:
        from psycopg.rows import tuple_row

        async with connection.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute(statement)
            row = await cursor.fetchone() if cursor.description else ()
        if not connection.autocommit:
            await connection.commit()
        return tuple(row or ())

    async def give_back(self, connection: Any) -> None:
        await self._pool.putconn(connection)


class _Asyncpg:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def limit(self) -> int:
        return int(self._pool.get_max_size())

    async def take(self, patience: float) -> Any:
        return await self._pool.acquire(timeout=patience)

    async def run(self, connection: Any, statement: str) -> tuple[Any, ...]:
        row = await connection.fetchrow(statement)
        return tuple(row.values()) if row else ()

    async def give_back(self, connection: Any) -> None:
        await self._pool.release(connection)


class _Engine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def limit(self) -> int:
        # What is idle; a pool that keeps nothing says nothing, and one more is a new one.
        idle = getattr(self._engine.pool, "checkedin", None)
        return max(int(idle()), 1) if idle is not None else 1

    async def take(self, patience: float) -> Any:
        # Not by connect(): that begins transactions, which an adapter binds to a user, and there is none yet.
        return self._engine.raw_connection()

    async def run(self, connection: Any, statement: str) -> tuple[Any, ...]:
        cursor = connection.cursor()
        try:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else ()
        finally:
            cursor.close()
        connection.commit()
        return tuple(row or ())

    async def give_back(self, connection: Any) -> None:
        connection.close()
