"""Who connects, and whom they may become."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ucm_postgres.doctor.catalog import Catalog, Role
from ucm_postgres.doctor.findings import Finding, Severity
from ucm_postgres.doctor.mending import identifier

_BOOTSTRAP: Final = 10  # the oid of the superuser that initdb makes, and that nobody can demote

# What may read or write the server's files, or run programs there, is as good as its superuser.
_AS_GOOD: Final = "pg_execute_server_program", "pg_read_server_files", "pg_write_server_files"


def examine_roles(catalog: Catalog) -> Iterator[Finding]:
    """The login, the role that transactions take on, and the roles that the login may become."""
    yield from _attributes(catalog, catalog.login, "the login")
    name = catalog.binding.role
    if name is not None:
        yield from _named_role(catalog, name)
    if not catalog.login.is_superuser:  # who may become anybody
        yield from _memberships(catalog)


def _attributes(catalog: Catalog, role: Role, who: str) -> Iterator[Finding]:
    if role.is_superuser:
        if role.oid == _BOOTSTRAP:
            another = identifier(catalog, "app_login")
            yield Finding(
                "superuser",
                "serious",
                role.name,
                f"{who} is the superuser that the server was made with: no policy holds it back, and it cannot be "
                "demoted; let the application log in as a role of its own, and grant that what it needs",
                f"create role {another} login nosuperuser nobypassrls;",
            )
        else:
            problem = f"{who} is a superuser: no policy holds it back"
            yield Finding("superuser", "serious", role.name, problem, f"alter role {role.name} nosuperuser;")
    if role.bypasses and role.oid != _BOOTSTRAP:
        problem = f"{who} has BYPASSRLS: no policy holds it back"
        yield Finding("bypassrls", "serious", role.name, problem, f"alter role {role.name} nobypassrls;")
    if role.is_superuser:
        return
    if role.replicates:
        problem = f"{who} has REPLICATION: it may read what everybody writes from the log, where no policy is asked"
        yield Finding("replication", "serious", role.name, problem, f"alter role {role.name} noreplication;")
    if role.makes_roles and catalog.version < 160000:  # from then on, its own
        problem = f"{who} has CREATEROLE: it may grant itself any role but a superuser's"
        yield Finding("createrole", "serious", role.name, problem, f"alter role {role.name} nocreaterole;")


def _named_role(catalog: Catalog, name: str) -> Iterator[Finding]:
    quoted = identifier(catalog, name)
    role = catalog.named_role
    if role is None:
        yield Finding(
            "role-missing",
            "serious",
            quoted,
            "transactions are to take on this role, and there is none: each of them fails",
            f"create role {quoted} nologin;\ngrant {quoted} to {catalog.login.name};",
        )
        return
    asked = f"select pg_has_role(%s::oid, %s::oid, '{_may_become(catalog)}')"
    if not catalog.value(asked, catalog.login.oid, role.oid):
        yield Finding(
            "role-closed",
            "serious",
            quoted,
            "transactions are to take on this role, and the login may not: each of them fails",
            f"grant {quoted} to {catalog.login.name};",
        )
    yield from _attributes(catalog, role, "the role that transactions take on")


@dataclass(frozen=True, slots=True)
class _Reachable:
    oid: int
    name: str
    bypasses: bool
    as_good: bool
    replicates: bool
    owned: list[str]


@dataclass(frozen=True, slots=True)
class _Grant:
    role: str
    grantor: str


_REACHABLE: Final = """
select r.oid::int8 as oid, quote_ident(r.rolname) as name, (r.rolsuper or r.rolbypassrls) as bypasses,
    r.rolname = any(%(as_good)s) as as_good, r.rolreplication as replicates,
    array(
        select format('%%I.%%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = any(%(tables)s) and c.relowner = r.oid order by 1
    ) as owned
from pg_roles r where r.oid not in (%(login)s, %(role)s) and (
    pg_has_role(%(login)s, r.oid, %(how)s) or pg_has_role(%(login)s, r.oid, 'MEMBER WITH ADMIN OPTION')
    or (r.rolname = any(%(as_good)s) and pg_has_role(%(login)s, r.oid, 'USAGE'))
)
order by 2
"""

_GRANTS: Final = """
select distinct quote_ident(pg_get_userbyid(roleid)) as role, quote_ident(pg_get_userbyid(grantor)) as grantor
from pg_auth_members
where member = %(login)s and (roleid = %(target)s or pg_has_role(roleid, %(target)s, 'MEMBER')) order by 1, 2
"""


def _memberships(catalog: Catalog) -> Iterator[Finding]:
    tables = [table.oid for table in catalog.tables]
    found = catalog.rows(_Reachable, _REACHABLE, as_good=list(_AS_GOOD), tables=tables, how=_may_become(catalog))
    for role in found:
        severity: Severity = "serious"
        if role.bypasses:
            why = "is not held back by any policy"
        elif role.as_good:
            why = "reaches the server's files or programs, and so everything"
        elif role.owned:
            why = f"owns {', '.join(role.owned)}, and may switch the policies off"
        elif role.replicates:
            why = "has REPLICATION, and reads what everybody writes from the log"
        elif freed := [table.name for table in catalog.tables if table.enabled and catalog.frees(role.oid, table)]:
            why = f"is let through by other policies of {', '.join(freed)}"
            severity = "warning"  # they may be as good as those that the doctor judges
        else:
            continue
        problem = (
            f"{catalog.login.name} may use this role, SET ROLE to it or grant itself that; it {why}; any statement "
            "of the application can"
        )
        grants = catalog.rows(_Grant, _GRANTS, target=role.oid)
        mending = "\n".join(_revoked(catalog, grant) for grant in grants)
        yield Finding("membership", severity, role.name, problem, mending)


def _revoked(catalog: Catalog, grant: _Grant) -> str:
    # From 16 on a grant is taken back as the one who gave it.
    by = f" granted by {grant.grantor}" if catalog.version >= 160000 else ""
    return f"revoke {grant.role} from {catalog.login.name}{by};"


def _may_become(catalog: Catalog) -> str:
    return "SET" if catalog.version >= 160000 else "MEMBER"
