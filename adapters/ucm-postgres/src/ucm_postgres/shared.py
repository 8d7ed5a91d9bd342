"""What users share by design of the drivers: it holds no user's data, and the isolation report stops there.

For every toolkit that works with their connections. Each driver is imported when it is asked for.
"""


def psycopg_types() -> tuple[type, ...]:
    """What psycopg's connections share: how values are translated, of which each takes the whole process's."""
    from psycopg._queries import PostgresQuery
    from psycopg.adapt import AdaptersMap
    from psycopg.types import TypesRegistry

    return (AdaptersMap, TypesRegistry, PostgresQuery)


def psycopg_pool_types() -> tuple[type, ...]:
    """The same, and the pools of psycopg_pool, of both kinds."""
    from psycopg_pool.base import BasePool

    return (BasePool, *psycopg_types())


def asyncpg_types() -> tuple[type, ...]:
    """asyncpg's pool, which its connections refer to, and what they have in common with each other."""
    from asyncpg.pool import Pool  # type: ignore[import-untyped]
    from asyncpg.protocol.protocol import Codec  # type: ignore[import-untyped]

    return (Pool, Codec)
