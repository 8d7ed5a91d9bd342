"""The examination of a database, over one connection of the application's."""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from psycopg import Connection, Cursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ucm_middleware import ConfigurationError
from ucm_postgres.binding import Binding
from ucm_postgres.doctor.catalog import Catalog
from ucm_postgres.doctor.findings import SEVERITIES, Finding
from ucm_postgres.doctor.hardened import examine_hardened
from ucm_postgres.doctor.policies import examine_policies
from ucm_postgres.doctor.roles import examine_roles
from ucm_postgres.doctor.surroundings import examine_surroundings
from ucm_postgres.doctor.tables import examine_tables
from ucm_postgres.doctor.views import examine_functions, examine_schemas, examine_views

_SETTINGS = """
select set_config('client_encoding', 'UTF8', true), set_config('search_path', '', true),
    set_config('statement_timeout', '10s', true),
    set_config('lock_timeout', '2s', true)
"""


def examine(
    connection: Connection[Any], binding: Binding | None = None, *, user_column: str = "user_id"
) -> tuple[Finding, ...]:
    """All that is wrong with how a database keeps users apart, the worst first.

    ``connection`` is one that the application's statements go over, by the same login, and in no transaction.
    ``binding`` is what the application binds with. A table with a column called ``user_column`` is taken to hold users'
    rows. It changes nothing: all is asked in a read-only transaction, which is rolled back. Of rows it asks only
    whether there are any that should not be visible, for 10 seconds a table at most.

    Raises ConfigurationError for a connection in a transaction, for a binding with ``role_of`` and for a server that is
    no PostgreSQL, and what psycopg raises.
    """
    binding = binding or Binding()
    if binding.role_of is not None:
        raise ConfigurationError(
            "role_of gives each user a role, and the doctor looks with the eyes of one; give Binding(role=...) with "
            "any user's"
        )
    catalog = Catalog(connection, binding, user_column)
    with _only_looking(connection):
        path = str(catalog.value("select current_setting('search_path')"))
        connection.execute(_SETTINGS)
        catalog.require_postgres()
        found = [*examine_surroundings(catalog), *examine_roles(catalog)]
        closed = {"role-missing", "role-closed"} & {finding.code for finding in found}
        if binding.role is not None and not closed:
            connection.execute("select set_config('role', %s, true)", [binding.role])
        for part in (examine_hardened, examine_tables, examine_views, examine_functions, examine_schemas):
            found += part(catalog)
        # What was read of the catalogs has all names in full; functions that policies call may not.
        connection.execute("select set_config('search_path', %s, true)", [path])
        found += examine_policies(catalog)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def require_healthy(
    connection: Connection[Any],
    binding: Binding | None = None,
    *,
    user_column: str = "user_id",
    also: Sequence[Finding] = (),
    accepted: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Examine at the start of an application, and refuse to start where something serious is found.

    ``also`` is what else was found, by ``examine_pool``, to be judged with the rest. ``accepted`` are the keys of
    findings that are meant to be so. What is not serious, and not accepted, is returned.

    Raises ConfigurationError, which names every serious finding with the SQL that mends it, and what ``examine``
    raises.
    """
    found = unaccepted((*also, *examine(connection, binding, user_column=user_column)), accepted)
    serious = [finding for finding in found if finding.severity == "serious"]
    if serious:
        lines = [f"- {finding.key}: {finding.problem}\n  {_indented(finding.sql)}" for finding in serious]
        raise ConfigurationError(
            f"the database does not keep users apart, in {len(serious)} ways; run the SQL below each, or accept those "
            "that are meant to be so by their keys:\n" + "\n".join(lines)
        )
    return found


def unaccepted(found: Collection[Finding], accepted: Collection[str]) -> tuple[Finding, ...]:
    """The findings that nobody has accepted. Raises ConfigurationError for a key that is none of a finding's."""
    unknown = set(accepted) - {finding.key for finding in found}
    if unknown:
        raise ConfigurationError(
            f"{', '.join(sorted(unknown))}: accepted, and not found any more; take it out, or it hides what comes next"
        )
    return tuple(finding for finding in found if finding.key not in accepted)


def _indented(sql: str) -> str:
    return sql.replace("\n", "\n  ") or "(no SQL mends it)"


@contextmanager
def _only_looking(connection: Connection[Any]) -> Generator[None]:
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise ConfigurationError("the connection is in a transaction, or closed; give the doctor one that is idle")
    before = connection.read_only, connection.prepare_threshold, connection.row_factory, connection.cursor_factory
    connection.read_only = True
    connection.prepare_threshold = None  # behind a pooler, a prepared statement would be left to somebody else
    connection.row_factory, connection.cursor_factory = tuple_row, Cursor
    try:
        with connection.transaction(force_rollback=True):
            yield
    finally:
        connection.prepare_threshold, connection.row_factory, connection.cursor_factory = before[1:]
        if not connection.closed:
            connection.read_only = before[0]
