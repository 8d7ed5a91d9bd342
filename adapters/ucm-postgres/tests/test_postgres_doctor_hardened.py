"""The doctor and signed user ids: only what is signed counts, and nobody reads the keys."""

import psycopg
import pytest

from support.postgres import Database
from ucm_postgres import Binding
from ucm_postgres.doctor import Finding, examine
from ucm_postgres.policies import policy_sql, setup_sql

SIGNED = Binding(signed=True)


def look(database: Database) -> tuple[Finding, ...]:
    with psycopg.connect(database.app.dsn) as connection:
        return examine(connection, SIGNED)


@pytest.fixture
def hardened(database: Database) -> Database:
    """With what checks signatures, which is a superuser's, and the table `notes` under it."""
    database.execute(setup_sql(database.app.user, binding=SIGNED), as_=database.superuser)
    database.execute("drop policy notes_of_user on notes")
    database.execute(policy_sql("notes", binding=SIGNED), as_=database.superuser)
    return database


def test_one_that_is_as_the_helpers_make_it_is_healthy(hardened: Database) -> None:
    assert look(hardened) == ()


def test_a_function_that_is_missing(database: Database) -> None:
    database.execute("drop table notes")
    (finding,) = look(database)
    assert finding.key == "signing-missing:ucm.current_user_id()"
    database.execute(finding.sql, as_=database.superuser)
    assert "signing-missing" not in {finding.code for finding in look(database)}


def test_keys_that_the_role_can_read(hardened: Database) -> None:
    hardened.execute("grant select on ucm.signing_keys to public", as_=hardened.superuser)
    (finding,) = look(hardened)
    assert (finding.key, finding.severity) == ("keys-open:ucm.signing_keys", "serious")
    hardened.execute(finding.sql, as_=hardened.superuser)
    assert look(hardened) == ()


def test_a_policy_that_takes_an_unsigned_user_id(hardened: Database) -> None:
    hardened.execute("create policy old on notes using (user_id = nullif(current_setting('app.user_id', true), ''))")
    (finding,) = look(hardened)
    assert (finding.key, finding.severity) == ("unsigned:public.notes.old", "serious")
    assert "ucm.current_user_id()" in finding.sql
    hardened.execute(finding.sql, as_=hardened.superuser)
    assert look(hardened) == ()


@pytest.mark.parametrize("kind", ["text", "uuid", "bigint"])
def test_a_table_without_policies_gets_one_that_checks_signatures(hardened: Database, kind: str) -> None:
    hardened.execute(f"create table typed (user_id {kind}); grant select, insert on typed to {{app}}")
    (finding,) = look(hardened)
    assert finding.key == "row-security-off:public.typed"
    hardened.execute(finding.sql, as_=hardened.superuser)
    assert look(hardened) == ()
