"""What the hardened mode stands on: the function that checks signed user ids, and keys that nobody reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ucm_postgres.doctor.catalog import GRANTEES, Catalog
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.mending import revoked
from ucm_postgres.policies import SCHEMA, setup_sql

FUNCTION: Final = f"{SCHEMA}.current_user_id()"


@dataclass(frozen=True, slots=True)
class _Keys:
    name: str
    owner: str
    is_own: bool
    is_reachable: bool
    grantees: list[str]


_KEYS: Final = f"""
select format('%%I.%%I', n.nspname, c.relname) as name, quote_ident(pg_get_userbyid(c.relowner)) as owner,
    (pg_has_role(%(login)s, c.relowner, 'USAGE') or pg_has_role(%(role)s, c.relowner, 'USAGE')) as is_own,
    has_any_column_privilege(%(role)s, c.oid, 'SELECT, INSERT, UPDATE')
        or has_any_column_privilege(%(login)s, c.oid, 'SELECT, INSERT, UPDATE') as is_reachable,
    {{grantees}} as grantees
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = '{SCHEMA}' and c.relname = 'signing_keys'
"""


def examine_hardened(catalog: Catalog) -> Iterator[Finding]:
    """Nothing where user ids are not signed."""
    if not catalog.binding.signed:
        return
    if not catalog.value("select to_regprocedure(%s) is not null", FUNCTION):
        yield Finding(
            "signing-missing",
            "serious",
            FUNCTION,
            "user ids are signed, and the function that checks them is not there; then install the keys too, with "
            "ucm_postgres.policies.install_keys()",
            setup_sql(catalog.role.bare_name, binding=catalog.binding),
        )
    if catalog.role.is_superuser:
        return
    grantees = GRANTEES.format(acl="c.relacl", kind="r", owner="c.relowner")
    for keys in catalog.rows(_Keys, _KEYS.replace("{grantees}", grantees)):
        if keys.is_own or keys.is_reachable:
            yield Finding(
                "keys-open",
                "serious",
                keys.name,
                "the role reaches the keys that user ids are signed with, and so can sign any"
                + (f"; let the schema be another role's, not {keys.owner}'s" if keys.is_own else ""),
                revoked("all", keys.name, keys.grantees),
            )
