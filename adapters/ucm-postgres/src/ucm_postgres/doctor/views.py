"""Ways around the tables' policies: views, and functions that run as their owner."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ucm_postgres.doctor.catalog import GRANTEES, Catalog, Table
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.mending import revoked, secured_wholly


@dataclass(frozen=True, slots=True)
class _View:
    name: str
    kind: str
    owner: str
    owner_oid: int
    invoker: bool
    owner_bypasses: bool
    targets: list[int]
    copies: list[str]
    """Materialized views among what it reads."""
    unreadable: list[str]
    grantees: list[str]


# Of each view all that its query reads, through other views too.
_VIEWS: Final = """
with recursive reads(view, target) as (
    select r.ev_class, d.refobjid from pg_rewrite r
    join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid
        and d.refclassid = 'pg_class'::regclass and d.refobjid <> r.ev_class
    where r.ev_type = '1'
), reaches(view, target) as (
    select view, target from reads
    union select reaches.view, reads.target from reaches join reads on reads.view = reaches.target
)
select format('%%I.%%I', n.nspname, c.relname) as name, c.relkind::text as kind,
    quote_ident(o.rolname) as owner, o.oid::int8 as owner_oid,
    coalesce((
        select option_value::bool from pg_options_to_table(c.reloptions) where option_name = 'security_invoker'
    ), false) as invoker,
    (o.rolsuper or o.rolbypassrls) as owner_bypasses,
    array(select target::int8 from reaches where view = c.oid and target = any(%(tables)s)) as targets,
    array(
        select format('%%I.%%I', mn.nspname, m.relname) from pg_class m join pg_namespace mn on mn.oid = m.relnamespace
        where m.relkind = 'm' and m.oid in (select target from reaches where view = c.oid)
            and m.oid in (select view from reaches where target = any(%(tables)s)) order by 1
    ) as copies,
    array(
        select format('%%I.%%I', tn.nspname, t.relname) from pg_class t join pg_namespace tn on tn.oid = t.relnamespace
        where t.oid in (select target from reads where view = c.oid) and t.relkind in ('r', 'p', 'v')
            and not has_table_privilege(%(role)s, t.oid, 'SELECT')
    ) as unreadable,
    {grantees} as grantees
from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_roles o on o.oid = c.relowner
where c.relkind in ('v', 'm') and c.oid in (select view from reaches where target = any(%(tables)s))
    and n.nspname not in ('pg_catalog', 'information_schema')
    and (has_any_column_privilege(%(role)s, c.oid, 'SELECT, INSERT, UPDATE')
        or has_table_privilege(%(role)s, c.oid, 'DELETE'))
order by 1
"""


def examine_views(catalog: Catalog) -> Iterator[Finding]:
    """Views that run as their owner, and materialized views, which hold the rows of whoever refreshed them."""
    grantees = GRANTEES.format(acl="c.relacl", kind="r", owner="c.relowner")
    tables = [table.oid for table in catalog.tables]
    for view in catalog.rows(_View, _VIEWS.replace("{grantees}", grantees), tables=tables):
        names = ", ".join(catalog.table_of[oid].name for oid in view.targets)
        if view.kind == "m":
            yield Finding(
                "materialized-view",
                "serious",
                view.name,
                f"it holds rows of {names} as its owner saw them, and has no row security: the role sees them all",
                revoked("all", view.name, view.grantees),
            )
        elif not view.invoker and view.copies:
            yield Finding(
                "view",
                "serious",
                view.name,
                f"without security_invoker it reads {', '.join(view.copies)} as its owner, {view.owner}: a copy of "
                f"rows of {names}, which has no row security",
                revoked("all", view.name, view.grantees),
            )
        elif not view.invoker:
            yield _as_owner(catalog, view, names)


def _as_owner(catalog: Catalog, view: _View, names: str) -> Finding:
    if catalog.version >= 150000:
        mending = [f"alter view {view.name} set (security_invoker = true);"]
        # With that the role needs the tables themselves, and the view is no longer what stands before them.
        mending += [
            secured_wholly(catalog, catalog.table_of[oid]) for oid in view.targets if not _is_enabled(catalog, oid)
        ]
        mending += [f"grant select on {name} to {catalog.role.name};" for name in view.unreadable]
        sql = "\n".join(mending)
    else:
        sql = revoked("all", view.name, view.grantees)  # 15 is the first to have it
    tables = [catalog.table_of[oid] for oid in view.targets]
    if view.owner_bypasses or any(_is_free_of(catalog, view.owner_oid, table) for table in tables):
        problem = f"without security_invoker it reads {names} as its owner, {view.owner}, whom no policy holds back"
        return Finding("view", "serious", view.name, problem, sql)
    problem = (
        f"without security_invoker it reads {names} as its owner, {view.owner}: by the owner's policies and "
        "privileges, not by those of the one who asks"
    )
    return Finding("view", "warning", view.name, problem, sql)


def _is_enabled(catalog: Catalog, oid: int) -> bool:
    return catalog.table_of[oid].enabled


def _is_free_of(catalog: Catalog, role: int, table: Table) -> bool:
    if not table.enabled:
        return True
    if catalog.frees(role, table):
        return True
    if table.forced:
        return False
    asked = "select pg_has_role(%s::oid, relowner, 'USAGE') from pg_class where oid = %s::oid"
    return bool(catalog.value(asked, role, table.oid))


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    owner: str
    owner_oid: int
    owner_bypasses: bool
    source: str


# A function that policies call is part of what holds users back.
_FUNCTIONS: Final = """
select format('%%I.%%I(%%s)', n.nspname, f.proname, pg_get_function_identity_arguments(f.oid)) as name,
    quote_ident(o.rolname) as owner, o.oid::int8 as owner_oid, (o.rolsuper or o.rolbypassrls) as owner_bypasses,
    pg_get_functiondef(f.oid) as source
from pg_proc f join pg_namespace n on n.oid = f.pronamespace join pg_roles o on o.oid = f.proowner
where f.prosecdef and f.prokind in ('f', 'p') and n.nspname not in ('pg_catalog', 'information_schema')
    and f.prorettype not in ('trigger'::regtype, 'event_trigger'::regtype)
    and has_function_privilege(%(role)s, f.oid, 'EXECUTE') and has_schema_privilege(%(role)s, n.oid, 'USAGE')
    and not exists (
        select from pg_depend e where e.classid = 'pg_proc'::regclass and e.objid = f.oid and e.deptype = 'e'
    )
    and not exists (
        select from pg_depend p where p.classid = 'pg_policy'::regclass and p.refclassid = 'pg_proc'::regclass
            and p.refobjid = f.oid
    )
order by 1
"""


def examine_functions(catalog: Catalog) -> Iterator[Finding]:
    """Functions that run as an owner whom policies do not hold back."""
    for function in catalog.rows(_Function, _FUNCTIONS):
        source = function.source.lower()
        named = [table for table in catalog.tables if table.bare_name.lower() in source]
        if function.owner_bypasses:
            reached = named
        else:
            reached = [table for table in named if _is_free_of(catalog, function.owner_oid, table)]
            if not reached:
                continue
        problem = f"it runs as its owner, {function.owner}, whom no policy holds back"
        if reached:
            problem += f", and names {', '.join(table.name for table in reached)}"
        yield Finding(
            "security-definer",
            "serious" if reached else "warning",
            function.name,
            f"{problem}; the role may call it",
            f"alter routine {function.name} security invoker;",
        )


@dataclass(frozen=True, slots=True)
class _Schema:
    name: str
    grantees: list[str]


_SCHEMAS: Final = """
select quote_ident(n.nspname) as name, {grantees} as grantees from pg_namespace n
where n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and has_schema_privilege(%(role)s, n.oid, 'CREATE')
order by 1
"""


_DATABASE: Final = """
select quote_ident(d.datname) as name, {grantees} as grantees from pg_database d
where d.datname = current_database() and has_database_privilege(%(role)s, d.oid, 'CREATE')
"""


def examine_schemas(catalog: Catalog) -> Iterator[Finding]:
    """Schemas that the role may create in: what one user puts there, the others' statements may find and run."""
    if catalog.role.is_superuser:
        return
    grantees = GRANTEES.format(acl="d.datacl", kind="d", owner="d.datdba")
    for database in catalog.rows(_Schema, _DATABASE.replace("{grantees}", grantees)):
        problem = (
            "the role may create schemas in it: one that is called like the login comes before public in the search "
            "path, and what SQL in one user's transaction puts there, others' statements take for what they meant"
        )
        subject = f"database {database.name}"
        yield Finding("schema-open", "warning", subject, problem, revoked("create", subject, database.grantees))
    grantees = GRANTEES.format(acl="n.nspacl", kind="n", owner="n.nspowner")
    for schema in catalog.rows(_Schema, _SCHEMAS.replace("{grantees}", grantees)):
        problem = (
            "the role may create functions and tables in it: what SQL in one user's transaction puts there, others' "
            "statements may take for what they meant, and run"
        )
        mending = revoked("create", f"schema {schema.name}", schema.grantees)
        yield Finding("schema-open", "warning", schema.name, problem, mending)
