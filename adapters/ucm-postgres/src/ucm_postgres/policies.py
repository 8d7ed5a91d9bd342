"""The SQL of row-level security: policies for tables, and what checks signed user ids. For migrations; runs nothing
itself, ``install_keys`` apart.
"""

import re
from collections.abc import Sequence
from textwrap import dedent
from typing import TYPE_CHECKING, Any, Final

from ucm_middleware import ConfigurationError
from ucm_postgres.binding import Binding
from ucm_postgres.signing import SigningKey

if TYPE_CHECKING:
    from psycopg import Connection

SCHEMA: Final = "ucm"
"""Where the hardened mode keeps its keys and its function."""

WINDOW: Final = 60
"""Seconds that the clocks of application and database may differ, the waits in between included."""

_MAX_BYTES: Final = 63  # PostgreSQL cuts a longer name, with no more than a notice
_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*( [a-z][a-z0-9_]*)*")


def quoted(name: str, field: str) -> str:
    """A name as a quoted identifier. Raises ConfigurationError for what cannot be one."""
    if not name or "\0" in name or len(name.encode(errors="replace")) > _MAX_BYTES:
        raise ConfigurationError(
            f"{field} cannot be a name in PostgreSQL; give 1 to {_MAX_BYTES} bytes without NUL, as it stands in the "
            "catalog, not quoted and without a schema"
        )
    return '"' + name.replace('"', '""') + '"'


def policy_sql(
    table: str,
    column: str = "user_id",
    *,
    schema: str | None = None,
    column_type: str = "text",
    binding: Binding | None = None,
) -> str:
    """The statements that let each user see and write the rows of a table that are theirs, and no others.

    ``column`` holds whose a row is; ``column_type`` is its type, such as ``uuid``, to which the id is cast. The owner
    of the table is bound too (FORCE). Without a user nothing is visible: an unset setting is null, and so is what
    PostgreSQL leaves of one after a transaction, an empty text. The user is looked up once a query, not for each row,
    and found through an index.

    Superusers and roles with BYPASSRLS are not bound by any policy. Other permissive policies of the table add to
    this one. Raises ConfigurationError for what cannot be a name or a type.
    """
    binding = binding or Binding()
    if not _TYPE.fullmatch(column_type):
        raise ConfigurationError(
            f"column_type is {column_type!r}, which is no type; give one such as text, uuid, bigint"
        )
    where = quoted(table, "table") if schema is None else f"{quoted(schema, 'schema')}.{quoted(table, 'table')}"
    owner = quoted(column, "column")
    user = (
        f"{SCHEMA}.current_user_id()" if binding.signed else f"nullif(current_setting('{binding.setting}', true), '')"
    )
    mine = f"{owner} = (SELECT {user}{'' if column_type == 'text' else f'::{column_type}'})"
    return dedent(f"""\
        ALTER TABLE {where} ENABLE ROW LEVEL SECURITY;
        ALTER TABLE {where} FORCE ROW LEVEL SECURITY;
        CREATE POLICY rows_of_user ON {where} USING ({mine}) WITH CHECK ({mine});
        CREATE INDEX ON {where} ({owner});
        """)


def setup_sql(*roles: str, binding: Binding | None = None, window: int = WINDOW) -> str:
    """The statements that make what checks signed user ids: the schema ``ucm``, its table of keys and its function.

    Run them as the owner of the schema, who must not be the application's role. ``roles`` are those that transactions
    run as: the login, or the role that it takes on. ``window`` is how many seconds a value may be older or younger than
    the transaction that it is used in; it is compared with the beginning of that, so that long ones hold.

    No keys are in it; see ``install_keys``. Raises ConfigurationError for what cannot be a name, and without a role.
    """
    setting = (binding or Binding()).setting
    if not roles:
        raise ConfigurationError("roles is empty; name those that the application's transactions run as")
    if window < 1:
        raise ConfigurationError(f"window is {window!r}; give a number of seconds of at least 1")
    to = ", ".join(quoted(role, "roles") for role in roles)
    return _SETUP.replace("@setting@", setting).replace("@window@", str(int(window))).replace("@roles@", to)


def install_keys(connection: "Connection[Any]", subkeys: Sequence[bytes]) -> None:
    """Let the database know the keys that user ids are signed with: those given, and no others from then on.

    ``subkeys`` are ``manager.subkeys(ucm_postgres.PURPOSE)``: the current one, and those of previous secrets. For a
    rotation, install them here before the first process signs with the new one. They are sent as parameters. The
    transaction is the caller's to commit.

    Raises ConfigurationError for none.
    """
    if not subkeys:
        raise ConfigurationError("subkeys is empty: nobody could be told from anybody; give manager.subkeys(PURPOSE)")
    keys = [SigningKey.from_subkey(subkey) for subkey in subkeys]
    connection.execute(f"DELETE FROM {SCHEMA}.signing_keys".encode())
    for key in keys:
        connection.execute(
            f"INSERT INTO {SCHEMA}.signing_keys VALUES (%s, %s, %s)".encode(), [key.fingerprint, key.inner, key.outer]
        )


# The hashes of the two MACs are compared, and not the MACs: how long that takes tells how far two hashes agree, which
# helps nobody to find a MAC. The pattern has no backslashes, which mean something else where a session has turned
# standard_conforming_strings off. A value that is not right in any way is as good as none: null, which equals nothing.
_SETUP: Final = """CREATE SCHEMA ucm;
REVOKE ALL ON SCHEMA ucm FROM PUBLIC;
CREATE TABLE ucm.signing_keys (
    fingerprint text PRIMARY KEY,
    inner_key bytea NOT NULL CHECK (octet_length(inner_key) = 64),
    outer_key bytea NOT NULL CHECK (octet_length(outer_key) = 64)
);
REVOKE ALL ON ucm.signing_keys FROM PUBLIC;
CREATE FUNCTION ucm.current_user_id() RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $ucm$
DECLARE
    part text[] := regexp_match(
        current_setting('@setting@', true), '^(1[.]([0-9a-f]{16})[.]([0-9]{1,12})[.])([0-9a-f]{64})[.](.+)$'
    );
    signing ucm.signing_keys;
BEGIN
    IF part IS NULL OR abs(extract(epoch FROM transaction_timestamp()) - part[3]::bigint) > @window@ THEN
        RETURN NULL;
    END IF;
    SELECT * INTO signing FROM ucm.signing_keys WHERE fingerprint = part[2];
    IF sha256(decode(part[4], 'hex')) = sha256(
        sha256(signing.outer_key || sha256(signing.inner_key || convert_to(part[1] || part[5], 'UTF8')))
    ) THEN
        RETURN part[5];
    END IF;
    RETURN NULL;
END
$ucm$;
REVOKE ALL ON FUNCTION ucm.current_user_id() FROM PUBLIC;
GRANT USAGE ON SCHEMA ucm TO @roles@;
GRANT EXECUTE ON FUNCTION ucm.current_user_id() TO @roles@;
"""
