"""The SQL that mends what was found."""

from collections.abc import Sequence

from psycopg import sql

from ucm_postgres.doctor.catalog import Catalog, Policy, Table
from ucm_postgres.policies import SCHEMA

_COMMANDS = {"r": "select", "a": "insert", "w": "update", "d": "delete"}


def literal(catalog: Catalog, text: str) -> str:
    """A string, quoted."""
    return sql.Literal(text).as_string(catalog.connection)


def identifier(catalog: Catalog, name: str) -> str:
    """A name, quoted where it needs to be."""
    return str(catalog.value("select quote_ident(%s)", name))


def bound(catalog: Catalog) -> str:
    """The condition that a user is bound."""
    return f"nullif(current_setting({literal(catalog, catalog.binding.setting)}, true), '') is not null"


def is_users(catalog: Catalog, table: Table) -> str:
    """The condition that a row is the bound user's. The table has a column of the user."""
    if catalog.binding.signed:
        value = f"{SCHEMA}.current_user_id()"
    else:
        value = f"nullif(current_setting({literal(catalog, catalog.binding.setting)}, true), '')"
    cast = "" if table.user_type in {"text", "character varying"} else f"::{table.user_type}"
    # In a query of its own it is worked out once, and not for each row.
    return f"{table.user_column} = (select {value}{cast})"


def secured(table: Table) -> str:
    """Row security on, and for the owner too."""
    return f"alter table {table.name} enable row level security, force row level security;"


def policies_for(catalog: Catalog, table: Table, commands: Sequence[str]) -> str:
    """A policy for each of the commands: the rows are the user's. The table has a column of the user."""
    condition = is_users(catalog, table)
    if set(commands) >= set(_COMMANDS):
        return f"create policy {_name(catalog, table, 'user')} on {table.name} {_clauses('*', condition)};"
    return "\n".join(
        f"create policy {_name(catalog, table, _COMMANDS[command])} on {table.name} for {_COMMANDS[command]} "
        f"{_clauses(command, condition)};"
        for command in commands
    )


def secured_wholly(catalog: Catalog, table: Table) -> str:
    """Row security for a table that has none yet, with a policy unless it has some."""
    parts = [secured(table)]
    if table.user_column is not None and not any(policy.permissive for policy in catalog.policies[table.oid]):
        parts.append(policies_for(catalog, table, tuple(_COMMANDS)))
    return "\n".join(parts)


def rewritten(catalog: Catalog, table: Table, policy: Policy) -> str:
    """A policy, for the user's rows only. The table has a column of the user."""
    return f"alter policy {policy.name} on {table.name} {_clauses(policy.command, is_users(catalog, table))};"


def guarded(catalog: Catalog, table: Table, policy: Policy) -> str:
    """A policy as it is, and only where a user is bound."""
    parts = [f"alter policy {policy.name} on {table.name}"]
    if policy.using is not None:
        parts.append(f"using (({policy.using}) and {bound(catalog)})")
    if policy.check is not None:
        parts.append(f"with check (({policy.check}) and {bound(catalog)})")
    return " ".join(parts) + ";"


def fenced(catalog: Catalog, table: Table) -> str:
    """No rows at all where no user is bound, whatever the policies say."""
    name = _name(catalog, table, "bound")
    return f"create policy {name} on {table.name} as restrictive using ({bound(catalog)});"


def revoked(privileges: str, of: str, grantees: Sequence[str]) -> str:
    """Privileges taken from those that the role has them from."""
    return f"revoke {privileges} on {of} from {', '.join(grantees)};" if grantees else ""


def _name(catalog: Catalog, table: Table, what: str) -> str:
    return identifier(catalog, f"{table.bare_name[:40]}_{what}")


def _clauses(command: str, condition: str) -> str:
    clauses: list[str] = []
    if command != "a":
        clauses.append(f"using ({condition})")
    if command in {"*", "a", "w"}:
        clauses.append(f"with check ({condition})")
    return " ".join(clauses)
