"""Which driver an engine has."""

from typing import TYPE_CHECKING

from sqlalchemy import Engine

from ucm_middleware import ConfigurationError
from ucm_sqlalchemy.drivers.asyncpg import Asyncpg
from ucm_sqlalchemy.drivers.driver import Driver, Reset
from ucm_sqlalchemy.drivers.postgres import Postgres
from ucm_sqlalchemy.drivers.psycopg import AsyncPsycopg, Psycopg
from ucm_sqlalchemy.drivers.unbound import Unbound

if TYPE_CHECKING:
    from ucm_postgres import Binding


def driver_for(engine: Engine, binding: "Binding | None", reset: Reset) -> Driver:
    """What knows the engine's database and driver. Raises ConfigurationError for those that are not supported."""
    if reset not in ("return", "begin"):
        raise ConfigurationError(f'reset is {reset!r}; give "return", or "begin" behind a pooler such as PgBouncer')
    dialect = engine.dialect
    if dialect.name == "sqlite":
        if binding is not None:
            raise ConfigurationError(
                "binding is given, and the engine is one of SQLite, which knows no users: leave it out, and give each "
                "user a file with SQLitePerUser"
            )
        return Unbound()
    if dialect.name != "postgresql":
        raise ConfigurationError(f"the engine's database is {dialect.name}; supported are postgresql and sqlite")
    kinds: dict[tuple[str, bool], type[Postgres]] = {
        ("psycopg", False): Psycopg,
        ("psycopg", True): AsyncPsycopg,
        ("asyncpg", True): Asyncpg,
    }
    kind = kinds.get((dialect.driver, dialect.is_async))
    if kind is None:
        raise ConfigurationError(
            f"the engine's driver is {dialect.driver}; supported are postgresql+psycopg and postgresql+asyncpg"
        )
    if binding is None:
        from ucm_postgres import Binding

        binding = Binding()
    return kind(binding, reset)
