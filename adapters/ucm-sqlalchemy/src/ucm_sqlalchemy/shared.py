"""What users share by design of SQLAlchemy: there the isolation report stops. And what handles own besides.

Sessions, connections, transactions, results and loaded objects are not shared: each is one user's.
"""

from typing import Final

from sqlalchemy import AdaptedConnection, Compiled, Dialect, Engine, Pool
from sqlalchemy.connectors.asyncio import AsyncAdapt_dbapi_module
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.result import ResultMetaData
from sqlalchemy.event.base import _DispatchCommon  # pyright: ignore[reportPrivateUsage]
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import ClassManager, Mapper, QueryContext, registry, sessionmaker
from sqlalchemy.sql.base import CompileState, ExecutableOption
from sqlalchemy.sql.cache_key import HasCacheKey
from sqlalchemy.sql.visitors import Visitable
from sqlalchemy.util import immutabledict

from ucm_sqlalchemy.drivers.postgres import Postgres
from ucm_sqlalchemy.drivers.unbound import Unbound

SHARED: Final[tuple[type, ...]] = (
    *(Engine, AsyncEngine, Pool, Dialect, AsyncAdapt_dbapi_module, sessionmaker, async_sessionmaker),
    # Mappings, tables, columns and statements; the latter change by being copied.
    *(registry, Mapper, ClassManager, Visitable, ExecutableOption, HasCacheKey),
    # What is kept of a statement for the next time, and what refers to it: each execution, and each row.
    *(Compiled, CompileState, QueryContext, ExecutionContext, ResultMetaData),
    immutabledict,  # options; all that are empty are one
    _DispatchCommon,  # listeners
    *(Postgres, Unbound),
)


def driver_types(dialect: Dialect) -> tuple[type, ...]:
    """What connections of the dialect's driver share."""
    if dialect.name != "postgresql":
        return ()
    from ucm_postgres.shared import asyncpg_types, psycopg_types

    return asyncpg_types() if dialect.driver == "asyncpg" else psycopg_types()


def owned_types(dialect: Dialect) -> tuple[type, ...]:
    """What of the dialect's driver asks the database for one user, and can be neither awaited, iterated nor entered."""
    if dialect.driver != "asyncpg":
        return (AdaptedConnection,)
    from asyncpg import Connection  # type: ignore[import-untyped]
    from asyncpg.cursor import Cursor  # type: ignore[import-untyped]
    from asyncpg.prepared_stmt import PreparedStatement  # type: ignore[import-untyped]

    return (AdaptedConnection, Connection, Cursor, PreparedStatement)
