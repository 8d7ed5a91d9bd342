"""What the system catalogs say of the objects that the doctor judges. All names are quoted as SQL wants them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeVar

from psycopg import Connection
from psycopg.rows import class_row

from ucm_middleware import ConfigurationError
from ucm_postgres.binding import Binding

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Role:
    """The login, or the role that transactions take on."""

    oid: int
    bare_name: str
    name: str
    is_superuser: bool
    bypasses: bool
    """It has BYPASSRLS."""
    replicates: bool
    makes_roles: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table, partitioned table or foreign table that holds users' rows, as far as anybody can tell."""

    oid: int
    schema: str
    bare_name: str
    name: str
    kind: str  # r, p or f
    enabled: bool
    forced: bool
    owner: str
    is_own: bool
    """The login, or the role it takes on, counts as its owner."""
    user_column: str | None
    user_type: str | None
    parents: list[int]
    """And theirs."""
    privileges: list[str]
    """Those of select, insert, update, delete and truncate that the role has, on a column at least."""
    grantees: list[str]

    @property
    def can_be_used(self) -> bool:
        """The role has privileges on it."""
        return bool(self.privileges)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that applies to the role."""

    table: int
    name: str
    bare_name: str
    command: str  # r, a, w, d or *
    permissive: bool
    using: str | None
    check: str | None
    mentions: bool
    """It reads the setting, itself or in a function that it calls."""

    def covers(self, command: str) -> bool:
        """It counts for this command: r, a, w or d."""
        return self.command in {"*", command}


_ROLES: Final = """
select oid::int8 as oid, rolname::text as bare_name, quote_ident(rolname) as name, rolsuper as is_superuser,
    rolbypassrls as bypasses, rolreplication as replicates, rolcreaterole as makes_roles
from pg_roles where rolname = %(name)s
"""

_TABLES: Final = """
with recursive ancestors(child, ancestor) as (
    select inhrelid, inhparent from pg_inherits
    union select child, inhparent from ancestors join pg_inherits on inhrelid = ancestor
)
select c.oid::int8 as oid, n.nspname::text as schema, c.relname::text as bare_name,
    format('%%I.%%I', n.nspname, c.relname) as name, c.relkind::text as kind,
    c.relrowsecurity as enabled, c.relforcerowsecurity as forced,
    quote_ident(pg_get_userbyid(c.relowner)) as owner,
    (pg_has_role(%(login)s, c.relowner, 'USAGE') or pg_has_role(%(role)s, c.relowner, 'USAGE')) as is_own,
    quote_ident(a.attname) as user_column, format_type(a.atttypid, null) as user_type,
    array(select ancestor::int8 from ancestors where child = c.oid) as parents,
    array(
        select kind from unnest(array['select', 'insert', 'update', 'delete', 'truncate']) kind
        where has_schema_privilege(%(role)s, n.oid, 'USAGE')
            and case when kind in ('delete', 'truncate') then has_table_privilege(%(role)s, c.oid, kind)
            else has_any_column_privilege(%(role)s, c.oid, kind) end
    ) as privileges,
    {grantees} as grantees
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
left join pg_attribute a on a.attrelid = c.oid and a.attname = %(column)s and a.attnum > 0 and not a.attisdropped
where c.relkind in ('r', 'p', 'f') and n.nspname not in ('pg_catalog', 'information_schema')
    and n.nspname !~ '^pg_(toast|temp)'
    and not exists (
        select from pg_depend e where e.classid = 'pg_class'::regclass and e.objid = c.oid and e.deptype = 'e'
    )
    and (
        a.attname is not null or c.relrowsecurity or exists (select from pg_policy p where p.polrelid = c.oid)
        or exists (
            select from ancestors join pg_class parent on parent.oid = ancestor
            where child = c.oid and parent.relrowsecurity
        )
    )
order by 4
"""

# Of a superuser's privileges, nothing can be taken by taking them from others.
GRANTEES: Final = """array(
    select distinct case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end
    from aclexplode(coalesce({acl}, acldefault('{kind}', {owner})))
    where grantee = 0 or grantee = %(role)s or (not %(is_superuser)s and pg_has_role(%(role)s, grantee, 'USAGE'))
    order by 1
)"""

_POLICIES: Final = """
select p.polrelid::int8 as table, quote_ident(p.polname) as name, p.polname::text as bare_name,
    p.polcmd::text as command, p.polpermissive as permissive,
    pg_get_expr(p.polqual, p.polrelid) as using, pg_get_expr(p.polwithcheck, p.polrelid) as check,
    (
        strpos(lower(pg_get_expr(p.polqual, p.polrelid)), %(setting)s) > 0
        or strpos(lower(pg_get_expr(p.polwithcheck, p.polrelid)), %(setting)s) > 0
        or exists (
            select from pg_depend d join pg_proc f on f.oid = d.refobjid and f.prokind = 'f'
            where d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_proc'::regclass
                and strpos(lower(pg_get_functiondef(f.oid)), %(setting)s) > 0
        )
    ) is true as mentions
from pg_policy p
where p.polrelid = any(%(tables)s) and (
    0 = any(p.polroles) or exists (select from unnest(p.polroles) r where pg_has_role(%(role)s, r, 'USAGE'))
)
order by 1, 3
"""


class Catalog:
    """The catalogs, read when asked for. Raises ConfigurationError when a role of the binding's does not exist."""

    def __init__(self, connection: Connection[Any], binding: Binding, user_column: str) -> None:
        self.connection = connection
        self.binding = binding
        self.version = connection.info.server_version
        """Such as 180006."""
        self.user_column = user_column
        """As it stands in the catalog, not quoted."""

    def rows(self, kind: type[_T], query: str, **parameters: object) -> list[_T]:
        """What a query gives, one object for each row. It may use %(login)s and %(role)s, and {grantees}."""
        given = {**self._parameters, **parameters}
        with self.connection.cursor(row_factory=class_row(kind)) as cursor:
            return cursor.execute(query.encode(), given).fetchall()

    def value(self, query: str, *parameters: object) -> object:
        """The one value that a query gives; None where it gives none."""
        row = self.connection.execute(query.encode(), parameters or None).fetchone()
        return row[0] if row else None

    @cached_property
    def login(self) -> Role:
        """Who is connected."""
        with self.connection.cursor(row_factory=class_row(Role)) as cursor:
            row = cursor.execute(_ROLES.replace("%(name)s", "session_user").encode()).fetchone()
        assert row is not None  # it is connected
        return row

    @cached_property
    def named_role(self) -> Role | None:
        """The role that the binding names, or None where it names none or there is no such role."""
        if self.binding.role is None:
            return None
        with self.connection.cursor(row_factory=class_row(Role)) as cursor:
            return cursor.execute(_ROLES, {"name": self.binding.role}).fetchone()

    @property
    def role(self) -> Role:
        """Whom the statements of a transaction run as."""
        return self.named_role or self.login

    @cached_property
    def tables(self) -> list[Table]:
        """What holds users' rows: has the column of the user or policies, or row security is on."""
        grantees = GRANTEES.format(acl="c.relacl", kind="r", owner="c.relowner")
        return self.rows(Table, _TABLES.replace("{grantees}", grantees), column=self.user_column)

    @cached_property
    def table_of(self) -> dict[int, Table]:
        """The same by their oids."""
        return {table.oid: table for table in self.tables}

    @cached_property
    def policies(self) -> dict[int, list[Policy]]:
        """Of each table, those that apply."""
        found: dict[int, list[Policy]] = {table.oid: [] for table in self.tables}
        setting = self.binding.setting.lower()
        for policy in self.rows(Policy, _POLICIES, tables=list(found), setting=setting):
            found[policy.table].append(policy)
        return found

    @property
    def _parameters(self) -> dict[str, object]:
        return {"login": self.login.oid, "role": self.role.oid, "is_superuser": self.role.is_superuser}

    def frees(self, role: int, table: Table) -> bool:
        """A policy lets this role see what it would not let the application's: none of that one's, and no setting."""
        asked = (
            "select exists (select from pg_policy p, unnest(p.polroles) r, pg_get_expr(p.polqual, p.polrelid) condition"
            " where p.polrelid = %s::oid and p.polpermissive and r <> 0 and pg_has_role(%s::oid, r, 'USAGE')"
            " and condition <> all(%s::text[]) and strpos(lower(condition), %s) = 0)"
        )
        conditions = [policy.using for policy in self.policies[table.oid] if policy.using is not None]
        return bool(self.value(asked, table.oid, role, conditions, self.binding.setting.lower()))

    def require_postgres(self) -> None:
        """Raises ConfigurationError for a server that is none, or too old."""
        said = str(self.value("select version()"))
        if not said.startswith("PostgreSQL ") or self.version < 140000:
            found = said.split(" on ")[0][:100]
            raise ConfigurationError(f"the server says that it is {found!r}; the doctor knows PostgreSQL, from 14 on")
