"""Tables whose policies do not hold, whatever they say."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ucm_postgres.doctor.catalog import Catalog, Table
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.mending import identifier, policies_for, revoked, secured_wholly

COMMANDS: Final = {"select": "r", "insert": "a", "update": "w", "delete": "d"}


def examine_tables(catalog: Catalog) -> Iterator[Finding]:
    """Row security: on, forced, with a policy for what is granted, and on whatever the rows can be reached by."""
    for table in catalog.tables:
        if table.kind == "f":
            yield from _foreign(table)
        elif _secured_parents(catalog, table) and not table.enabled:
            yield from _child(catalog, table)
        elif not table.enabled:
            yield from _not_enabled(catalog, table)
        else:
            yield from _not_forced(table)
            yield from _without_policy(catalog, table)
            yield from _truncate(table)
    yield from _owned(catalog)
    yield from _owned_functions(catalog)
    yield from _foreign_keys(catalog)


def _foreign(table: Table) -> Iterator[Finding]:
    if table.can_be_used:
        yield Finding(
            "foreign-table",
            "serious",
            table.name,
            "PostgreSQL has no row security for foreign tables: the role sees all rows of it",
            revoked("all", table.name, table.grantees),
        )


def _secured_parents(catalog: Catalog, table: Table) -> list[Table]:
    parents = [catalog.table_of[oid] for oid in table.parents if oid in catalog.table_of]
    return [parent for parent in parents if parent.enabled]


def _child(catalog: Catalog, table: Table) -> Iterator[Finding]:
    if table.can_be_used:
        parents = ", ".join(parent.name for parent in _secured_parents(catalog, table))
        yield Finding(
            "child-open",
            "serious",
            table.name,
            f"row security is off, and the role has {_listed(table)} on it: the policies of {parents} hold for what "
            "goes through that, and not for what names this table itself",
            revoked("all", table.name, table.grantees),
        )


def _not_enabled(catalog: Catalog, table: Table) -> Iterator[Finding]:
    if not table.can_be_used:
        return
    policies = catalog.policies[table.oid]
    why = "it has policies" if policies else f"it has a column {table.user_column}"
    yield Finding(
        "row-security-off",
        "serious",
        table.name,
        f"{why}, and row security is off: every user reaches all of its rows",
        secured_wholly(catalog, table),
    )


def _not_forced(table: Table) -> Iterator[Finding]:
    if table.forced:
        return
    mending = f"alter table {table.name} force row level security;"
    if table.is_own:
        problem = "the policies are not forced, and the login counts as the owner, whom they then do not hold back"
        yield Finding("not-forced", "serious", table.name, problem, mending)
    else:
        problem = (
            f"the policies are not forced: they do not hold back the owner, {table.owner}, nor a view or a function "
            "that runs as the owner"
        )
        yield Finding("not-forced", "warning", table.name, problem, mending)


def _without_policy(catalog: Catalog, table: Table) -> Iterator[Finding]:
    permissive = [policy for policy in catalog.policies[table.oid] if policy.permissive]
    missing = [
        name
        for name, command in COMMANDS.items()
        if name in table.privileges and not any(policy.covers(command) for policy in permissive)
    ]
    if missing:
        if table.user_column is not None:
            mending = policies_for(catalog, table, [COMMANDS[name] for name in missing])
        else:
            mending = revoked(", ".join(missing), table.name, table.grantees)
        problem = (
            f"the role has {', '.join(missing)} on it, and no policy for that applies: no row is visible, and none is "
            "taken"
        )
        yield Finding("no-policy", "warning", table.name, problem, mending)


def _truncate(table: Table) -> Iterator[Finding]:
    if "truncate" in table.privileges and not table.is_own:
        problem = "the role has truncate on it, which deletes the rows of all users: no policy is asked"
        mending = revoked("truncate", table.name, table.grantees)
        yield Finding("truncate", "serious", table.name, problem, mending)


def _owned(catalog: Catalog) -> Iterator[Finding]:
    owned = [table for table in catalog.tables if table.is_own and table.enabled]
    if not owned or catalog.login.is_superuser:
        return
    owner = identifier(catalog, "tables_owner")
    mending = [f"create role {owner} nologin;"]
    for table in owned:
        mending.append(f"alter table {table.name} owner to {owner};")
        mending.append(f"grant select, insert, update, delete on {table.name} to {catalog.role.name};")
    yield Finding(
        "owner",
        "warning",
        catalog.role.name,
        f"it counts as the owner of {', '.join(table.name for table in owned)}, and may switch row security off there; "
        "let the tables be another role's",
        "\n".join(mending),
    )


@dataclass(frozen=True, slots=True)
class _Function:
    name: str


_OWNED_FUNCTIONS: Final = """
select format('%%I.%%I(%%s)', n.nspname, f.proname, pg_get_function_identity_arguments(f.oid)) as name
from pg_proc f join pg_namespace n on n.oid = f.pronamespace
where (pg_has_role(%(login)s, f.proowner, 'USAGE') or pg_has_role(%(role)s, f.proowner, 'USAGE'))
    and f.oid in (
        select d.refobjid from pg_depend d join pg_policy p on p.oid = d.objid
        where d.classid = 'pg_policy'::regclass and d.refclassid = 'pg_proc'::regclass and p.polrelid = any(%(tables)s)
    )
order by 1
"""


def _owned_functions(catalog: Catalog) -> Iterator[Finding]:
    if catalog.login.is_superuser:
        return
    owner = identifier(catalog, "functions_owner")
    for function in catalog.rows(_Function, _OWNED_FUNCTIONS, tables=[table.oid for table in catalog.tables]):
        yield Finding(
            "function-owned",
            "serious" if catalog.binding.signed else "warning",
            function.name,
            f"policies ask it who the user is or what is theirs, and {catalog.role.name} counts as its owner: any "
            "statement of the application may replace it; let it be another role's",
            f"create role {owner} nologin;\nalter routine {function.name} owner to {owner};",
        )


@dataclass(frozen=True, slots=True)
class _ForeignKey:
    name: str
    source: int
    target: int
    columns: list[str]
    target_columns: list[str]
    source_name: str


_FOREIGN_KEYS: Final = """
select quote_ident(k.conname) as name, k.conrelid::int8 as source, k.confrelid::int8 as target,
    array(
        select quote_ident(a.attname) from unnest(k.conkey) with ordinality as c(number, place)
        join pg_attribute a on a.attrelid = k.conrelid and a.attnum = c.number order by c.place
    ) as columns,
    array(
        select quote_ident(a.attname) from unnest(k.confkey) with ordinality as c(number, place)
        join pg_attribute a on a.attrelid = k.confrelid and a.attnum = c.number order by c.place
    ) as target_columns,
    format('%%I.%%I', n.nspname, s.relname) as source_name
from pg_constraint k join pg_class s on s.oid = k.conrelid join pg_namespace n on n.oid = s.relnamespace
where k.contype = 'f' and k.confrelid = any(%(tables)s) and k.conparentid = 0
    and has_any_column_privilege(%(role)s, k.conrelid, 'INSERT, UPDATE')
order by 6, 1
"""


def _foreign_keys(catalog: Catalog) -> Iterator[Finding]:
    secured_tables = [table.oid for table in catalog.tables if table.enabled]
    for key in catalog.rows(_ForeignKey, _FOREIGN_KEYS, tables=secured_tables):
        source, target = catalog.table_of.get(key.source), catalog.table_of[key.target]
        if target.user_column is not None and target.user_column in key.target_columns:
            continue
        mending = ""
        if source is not None and source.user_column is not None and target.user_column is not None:
            columns = ", ".join([*key.columns, source.user_column])
            target_columns = ", ".join([*key.target_columns, target.user_column])
            mending = (
                f"alter table {target.name} add unique ({target_columns});\n"
                f"alter table {key.source_name} drop constraint {key.name}, "
                f"add constraint {key.name} foreign key ({columns}) references {target.name} ({target_columns});"
            )
        yield Finding(
            "foreign-key",
            "info",
            f"{key.source_name}.{key.name}",
            f"it is checked without policies: whoever writes {key.source_name} learns which rows {target.name} has, "
            "those of others too, and may refer to them"
            + ("" if mending else "; give both tables the user's column and refer to both, or let ids be unguessable"),
            mending,
        )


def _listed(table: Table) -> str:
    return ", ".join(table.privileges)
