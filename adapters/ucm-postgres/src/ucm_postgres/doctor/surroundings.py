"""The database, the connection, and what stands between."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ucm_postgres.doctor.catalog import Catalog
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.mending import identifier


def examine_surroundings(catalog: Catalog) -> Iterator[Finding]:
    """The encoding, a user that is bound before anybody binds one, and a pooler in between."""
    yield from _encoding(catalog)
    yield from _preset(catalog)
    yield from _pooler(catalog)


def _encoding(catalog: Catalog) -> Iterator[Finding]:
    encoding = catalog.value("select current_setting('server_encoding')")
    if encoding == "UTF8":
        return
    if encoding == "SQL_ASCII":
        problem = "its encoding is SQL_ASCII, which takes any bytes: one user's id may be kept in several spellings"
    else:
        problem = f"its encoding is {encoding}, which cannot hold all ids of users"
    name = str(catalog.value("select current_database()"))
    another = identifier(catalog, f"{name[:50]}_utf8")
    yield Finding(
        "encoding",
        "warning",
        identifier(catalog, name),
        f"{problem}; move to a database in UTF8, by pg_dump and psql",
        f"create database {another} template template0 encoding 'UTF8' locale 'C';",
    )


@dataclass(frozen=True, slots=True)
class _Default:
    role: str
    database: str


_DEFAULTS: Final = """
select coalesce(quote_ident(r.rolname), '') as role, coalesce(quote_ident(d.datname), '') as database
from pg_db_role_setting s left join pg_roles r on r.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
where (s.setrole in (0, %(login)s)) and (s.setdatabase = 0 or d.datname = current_database())
    and exists (select from unnest(s.setconfig) given where lower(split_part(given, '=', 1)) = %(setting)s)
order by 1, 2
"""


def _preset(catalog: Catalog) -> Iterator[Finding]:
    setting = catalog.binding.setting
    defaults = catalog.rows(_Default, _DEFAULTS, setting=setting.lower())
    for default in defaults:
        whom = f"role {default.role}" if default.role else ""
        where = f"database {default.database}" if default.database else ""
        target = f"{whom} in {where}" if whom and where else whom or where or "role all"
        problem = f"each connection begins with a {setting} that nobody has bound: its user is seen where no one is"
        yield Finding("preset", "serious", target, problem, f"alter {target} reset {setting};")
    if catalog.value("select nullif(current_setting(%s, true), '')", setting) is not None and not defaults:
        problem = "this connection comes with a user that is bound: its last borrower's, or the connection string's"
        yield Finding("preset", "serious", setting, problem, f"reset {setting};")


def _pooler(catalog: Catalog) -> Iterator[Finding]:
    # A pooler answers for the server while the client connects, and so makes up a number of its own.
    told = catalog.connection.info.backend_pid
    if catalog.value("select pg_backend_pid()") == told:
        return
    info = catalog.connection.info
    yield Finding(
        "pooler",
        "warning",
        f"{info.host}:{info.port}",
        "a pooler such as PgBouncer stands in between: in transaction mode, what is set for the session (SET, SET "
        "ROLE, temporary tables, LISTEN, advisory locks) goes to other clients; bind each transaction with "
        "reset='begin', or have the pooler reset after each (server_reset_query = DISCARD ALL, "
        "server_reset_query_always = 1)",
    )
