"""The doctor finds what is wrong, and its SQL mends it. It changes nothing itself."""

from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row

from support.postgres import Database, PostgresServer
from ucm_middleware import ConfigurationError
from ucm_postgres import Binding
from ucm_postgres.doctor import Finding, examine, require_healthy
from ucm_postgres.doctor.catalog import Catalog
from ucm_postgres.doctor.roles import examine_roles

POLICY = "user_id = nullif(current_setting('app.user_id', true), '')"
SAFE = (
    "alter table {0} enable row level security, force row level security; create policy p on {0} using ("
    + POLICY
    + ");"
)


def look(database: Database, binding: Binding | None = None) -> tuple[Finding, ...]:
    """What the doctor finds as the application's login."""
    with psycopg.connect(database.app.dsn) as connection:
        return examine(connection, binding)


def named(database: Database, text: str) -> str:
    return (
        text.replace("{app}", database.app.user)
        .replace("{owner}", database.owner.user)
        .replace("{database}", database.name)
    )


@dataclass(frozen=True)
class Case:
    """SQL that breaks the database, run by the owner or a superuser, and the finding that it makes."""

    sql: str
    key: str
    severity: str
    says: str = ""
    by_superuser: bool = False
    leaves: frozenset[str] = frozenset()
    """Codes that are there as well, before or after."""
    roles: tuple[str, ...] = field(default=())
    binding: Binding | None = None

    def __str__(self) -> str:
        return f"{self.severity} {self.key} {self.says}"


CASES = [
    Case("alter role {app} superuser", "superuser:{app}", "serious", "no policy", by_superuser=True),
    Case("alter role {app} bypassrls", "bypassrls:{app}", "serious", "no policy", by_superuser=True),
    Case("alter table notes no force row level security", "not-forced:public.notes", "warning", "{owner}"),
    Case(
        "alter table notes owner to {app}",
        "owner:{app}",
        "warning",
        "public.notes",
        by_superuser=True,
    ),
    Case(
        "alter table notes owner to {app}; alter table notes no force row level security",
        "not-forced:public.notes",
        "serious",
        "counts as the owner",
        by_superuser=True,
        leaves=frozenset({"owner"}),
    ),
    Case("alter table notes disable row level security", "row-security-off:public.notes", "serious", "policies"),
    Case(
        """create table "Odd ""Tasks" (user_id text, body text); grant select on "Odd ""Tasks" to {app}""",
        'row-security-off:public."Odd ""Tasks"',
        "serious",
        "column user_id",
    ),
    Case(
        "create table counts (user_id uuid, n int); grant all on counts to {app}",
        "row-security-off:public.counts",
        "serious",
        "column user_id",
        leaves=frozenset({"truncate"}),
    ),
    Case(
        f"drop policy notes_of_user on notes; create policy p on notes for select using ({POLICY})",
        "no-policy:public.notes",
        "warning",
        "insert, update, delete",
    ),
    Case(
        "create table audit (id int); alter table audit enable row level security, force row level security;"
        "grant select, insert on audit to {app}",
        "no-policy:public.audit",
        "warning",
        "select, insert",
    ),
    Case("grant truncate on notes to {app}", "truncate:public.notes", "serious", "deletes the rows of all"),
    Case(
        "create view all_notes as select * from notes; grant select on all_notes to {app};"
        "alter view all_notes owner to current_user",
        "view:public.all_notes",
        "serious",
        "security_invoker",
        by_superuser=True,
    ),
    Case(
        "create view all_notes as select * from notes; grant select on all_notes to {app}",
        "view:public.all_notes",
        "warning",
        "owner's policies",
    ),
    Case(
        "create table drafts (user_id text); create view my_drafts as select * from drafts;"
        "grant select on my_drafts to {app}",
        "view:public.my_drafts",
        "serious",
        "public.drafts as its owner",
    ),
    Case(
        "create view inner_notes as select * from notes;"
        "create view outer_notes as select * from inner_notes; grant select on outer_notes to {app};",
        "view:public.outer_notes",
        "serious",
        "public.notes",
        by_superuser=True,
        leaves=frozenset({"view"}),
    ),
    Case(
        "create materialized view kept as select * from notes; grant select on kept to public",
        "materialized-view:public.kept",
        "serious",
        "sees them all",
        by_superuser=True,
    ),
    Case(
        "create function peek(int) returns bigint language sql security definer as 'select count(*) from notes'",
        "security-definer:public.peek(integer)",
        "serious",
        "names public.notes",
        by_superuser=True,
    ),
    Case(
        "create procedure work() language plpgsql security definer as 'begin end'",
        "security-definer:public.work()",
        "warning",
        "whom no policy holds back",
        by_superuser=True,
    ),
    Case("grant create on schema public to public", "schema-open:public", "warning", "may create functions", True),
    Case(
        "create role more_{database} bypassrls; create role between_{database};"
        "grant more_{database} to between_{database};grant between_{database} to {app}",
        "membership:more_{database}",
        "serious",
        "SET ROLE",
        by_superuser=True,
        roles=("more_{database}", "between_{database}"),
    ),
    Case(
        "grant {owner} to {app}",
        "membership:{owner}",
        "serious",
        "owns public.notes",
        True,
        frozenset({"owner", "schema-open"}),
    ),
    Case("grant pg_read_server_files to {app}", "membership:pg_read_server_files", "serious", "files", True),
    Case(
        "create table events (user_id text, at date) partition by range (at);"
        "create table events_1 partition of events for values from ('2026-01-01') to ('2027-01-01');"
        + SAFE.format("events")
        + "grant select on events, events_1 to {app}",
        "child-open:public.events_1",
        "serious",
        "public.events",
    ),
    Case(
        "create table special (more text) inherits (notes); grant select, insert on special to {app}",
        "child-open:public.special",
        "serious",
        "public.notes",
    ),
    Case(
        "create table answers (user_id text, note bigint constraint answered references notes (id));"
        + SAFE.format("answers")
        + "grant select, insert on answers to {app}",
        "foreign-key:public.answers.answered",
        "info",
        "those of others",
    ),
    Case(
        "grant {owner} to {app} with admin true, inherit false, set false",
        "membership:{owner}",
        "serious",
        "grant itself that",
        True,
    ),
    Case(
        "grant pg_read_server_files to {app} with inherit true, set false",
        "membership:pg_read_server_files",
        "serious",
        "programs",
        True,
    ),
    Case(
        "create role reporting_{database}; create policy all_rows on notes to reporting_{database} using (true);"
        "grant reporting_{database} to {app} with inherit false",
        "membership:reporting_{database}",
        "warning",
        "other policies of public.notes",
        True,
        roles=("reporting_{database}",),
    ),
    Case("alter role {app} replication", "replication:{app}", "serious", "from the log", True),
    Case(
        "create policy all_rows on notes to {owner} using (true);"
        "create view all_notes as select * from notes; grant select on all_notes to {app}",
        "view:public.all_notes",
        "serious",
        "whom no policy holds back",
    ),
    Case(
        "create policy all_rows on notes to {owner} using (true);"
        "create function peek() returns setof notes language sql security definer as 'select * from notes'",
        "security-definer:public.peek()",
        "serious",
        "names public.notes",
    ),
    Case(
        f"create policy same on notes to {{owner}} using ({POLICY});"
        "create view all_notes as select * from notes; grant select on all_notes to {app}",
        "view:public.all_notes",
        "warning",
        "privileges",
    ),
    Case(
        "create materialized view kept as select * from notes;"
        "create view all_notes as select * from kept; grant select on all_notes to {app}",
        "view:public.all_notes",
        "serious",
        "a copy of rows of public.notes",
    ),
    Case(
        "create table events (note bigint, kind int) partition by list (kind);"
        "create table events_1 partition of events for values in (1) partition by list (note);"
        "create table events_1_1 partition of events_1 default;"
        "alter table events enable row level security, force row level security;"
        "create policy p on events using (exists (select from notes where notes.id = note));"
        "grant select on events_1_1 to {app}",
        "child-open:public.events_1_1",
        "serious",
        "public.events",
    ),
    Case(
        "grant create on database {database} to {app}",
        "schema-open:database {database}",
        "warning",
        "called like the login",
        True,
    ),
    Case(
        f"create function is_mine(user_id text) returns boolean stable language sql as $$select {POLICY}$$;"
        "create policy p on notes using (is_mine(user_id)); alter function is_mine(text) owner to {app}",
        "function-owned:public.is_mine(user_id text)",
        "warning",
        "may replace it",
        True,
        roles=("functions_owner",),
    ),
    Case("alter role {app} set app.user_id = 'alice'", "preset:role {app}", "serious", "nobody has bound", True),
    Case("alter database {database} set app.user_id = 'alice'", "preset:database {database}", "serious", "", True),
    Case(
        "alter role {app} in database {database} set app.user_id = 'alice'",
        "preset:role {app} in database {database}",
        "serious",
        "",
        True,
    ),
    Case(
        "select 1",
        "role-missing:absent_{database}",
        "serious",
        "there is none",
        binding=Binding(role="absent_{database}"),
        roles=("absent_{database}",),
        leaves=frozenset({"no-policy"}),
    ),
    Case(
        "create role closed_{database}",
        "role-closed:closed_{database}",
        "serious",
        "may not",
        by_superuser=True,
        binding=Binding(role="closed_{database}"),
        roles=("closed_{database}",),
    ),
]


class TestFindings:
    def test_a_healthy_database_has_none(self, database: Database) -> None:
        assert look(database) == ()

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_each_is_found_and_mended_by_its_sql(self, database: Database, case: Case) -> None:
        login = database.superuser if case.by_superuser else database.owner
        for role in case.roles:
            database.adopt(named(database, role))
        binding = case.binding
        if binding is not None and binding.role is not None:
            binding = Binding(role=named(database, binding.role))
        database.execute(named(database, case.sql), as_=login)
        key = named(database, case.key)
        before = {finding.key: finding for finding in look(database, binding)}
        assert key in before
        assert {finding.code for finding in before.values()} <= {case.key.split(":")[0], *case.leaves}
        assert before[key].severity == case.severity
        assert named(database, case.says) in before[key].problem

        database.execute(before[key].sql, as_=database.superuser)
        after = {finding.key: finding for finding in look(database, binding)}
        assert key not in after
        assert {finding.code for finding in after.values()} <= case.leaves

    def test_a_server_superuser_is_told_to_let_the_application_be_somebody_else(self, database: Database) -> None:
        with psycopg.connect(database.superuser.dsn) as connection:
            worst = examine(connection)[0]
        assert (worst.code, worst.severity) == ("superuser", "serious")
        assert "cannot be demoted" in worst.problem
        assert worst.sql.startswith("create role app_login login nosuperuser")

    def test_a_role_that_makes_roles_where_these_may_be_any(self, database: Database) -> None:
        database.execute("alter role {app} createrole", as_=database.superuser)
        with psycopg.connect(database.app.dsn) as connection:
            catalog = Catalog(connection, Binding(), "user_id")
            assert list(examine_roles(catalog)) == []
            catalog.version = 150000
            assert [finding.code for finding in examine_roles(catalog)] == ["createrole"]

    def test_an_encoding_that_takes_any_bytes(self, postgres_server: PostgresServer) -> None:
        with postgres_server.database(encoding="SQL_ASCII") as fresh:
            (finding,) = look(fresh)
        assert finding.key == f"encoding:{fresh.name}"
        assert "SQL_ASCII" in finding.problem
        assert finding.sql.startswith(f"create database {fresh.name}_utf8 ")

    def test_a_connection_that_brings_a_user_along(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn, autocommit=True) as connection:
            connection.execute("set app.user_id = 'alice'")
            (finding,) = examine(connection)
            assert finding.key == "preset:app.user_id"
            connection.execute(finding.sql.encode())
            assert examine(connection) == ()

    def test_another_setting_and_column(self, database: Database) -> None:
        database.execute("create table carts (holder text); grant select on carts to {app}; drop table notes")
        assert look(database) == ()
        with psycopg.connect(database.app.dsn) as connection:
            (finding,) = examine(connection, Binding(setting="shop.buyer"), user_column="holder")
            assert finding.key == "row-security-off:public.carts"
            assert "holder = (select nullif(current_setting('shop.buyer', true), '')" in finding.sql
            connection.rollback()
            database.execute(finding.sql)
            assert examine(connection, Binding(setting="shop.buyer"), user_column="holder") == ()


class TestRequireHealthy:
    def test_passes_where_nothing_serious_is_found_and_returns_the_rest(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn) as connection:
            assert require_healthy(connection) == ()
            database.execute("alter table notes no force row level security")
            assert [finding.code for finding in require_healthy(connection)] == ["not-forced"]

    def test_refuses_with_every_serious_finding_and_its_sql(self, database: Database) -> None:
        database.execute("alter table notes disable row level security; grant truncate on notes to {app};")
        database.execute("alter role {app} bypassrls", as_=database.superuser)
        with psycopg.connect(database.app.dsn) as connection, pytest.raises(ConfigurationError) as refusal:
            require_healthy(connection)
        message = str(refusal.value)
        for part in ("in 2 ways", "row-security-off:public.notes", "bypassrls:", "enable row level security"):
            assert part in message

    def test_what_is_accepted_is_passed_over_while_it_is_there(self, database: Database) -> None:
        database.execute("grant truncate on notes to {app}")
        with psycopg.connect(database.app.dsn) as connection:
            assert require_healthy(connection, accepted=["truncate:public.notes"]) == ()
            database.execute("revoke truncate on notes from {app}")
            with pytest.raises(ConfigurationError, match=r"truncate:public\.notes: accepted, and not found any more"):
                require_healthy(connection, accepted=["truncate:public.notes"])


class TestChangesNothing:
    def test_it_works_where_all_transactions_are_read_only(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn, options="-c default_transaction_read_only=on") as connection:
            assert examine(connection) == ()

    def test_its_transaction_is_read_only_and_nothing_is_written(self, database: Database) -> None:
        # A policy with a function that writes: where it could, it would do so now.
        database.execute(
            "create table public.seen (n int); grant insert on seen to {app};"
            "create function note_it() returns boolean language plpgsql volatile as"
            " $$begin raise notice '%', current_setting('transaction_read_only');"
            " insert into public.seen values (1); return false; end$$;"
            "create policy writing on notes using (note_it())"
        )
        told: list[str | None] = []
        with psycopg.connect(database.app.dsn) as connection:
            connection.add_notice_handler(lambda notice: told.append(notice.message_primary))
            (finding,) = examine(connection)
        assert finding.key == "not-judged:public.notes"  # it may have said true where it could write
        assert set(told) == {"on"}
        with psycopg.connect(database.owner.dsn) as connection:
            assert connection.execute("select count(*) from seen").fetchone() == (0,)

    def test_the_connection_is_as_it_was(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn, autocommit=True) as connection:
            examine(connection)
            assert connection.read_only is None
            rows = connection.execute(
                "select current_setting('search_path'), current_setting('statement_timeout'), current_setting('role'),"
                " coalesce(current_setting('app.user_id', true), '')"
            ).fetchone()
        assert rows == ('"$user", public', "0", "none", "")

    def test_the_connection_may_be_set_up_in_any_way_and_stays_so(self, database: Database) -> None:
        database.execute("grant truncate on notes to {app}")
        with psycopg.Connection[DictRow].connect(database.app.dsn, row_factory=dict_row) as connection:
            raw: Any = psycopg.RawCursor
            connection.cursor_factory = raw
            assert [finding.code for finding in examine(connection)] == ["truncate"]
            assert connection.prepare_threshold == 5
            question = "select count(*) as prepared from pg_prepared_statements where $1"
            assert connection.execute(question, [True]).fetchone() == {"prepared": 0}

    def test_a_role_for_each_user_is_asked_for_one(self, database: Database) -> None:
        binding = Binding(role_of=lambda context: context.user_id)
        with psycopg.connect(database.app.dsn) as connection, pytest.raises(ConfigurationError, match="any user's"):
            examine(connection, binding)

    def test_a_connection_in_a_transaction_is_refused(self, database: Database) -> None:
        with psycopg.connect(database.app.dsn) as connection:
            connection.execute("select 1")
            with pytest.raises(ConfigurationError, match="in a transaction"):
                examine(connection)
