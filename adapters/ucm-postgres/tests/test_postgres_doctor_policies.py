"""Policies are judged by what they let through, also where the table is empty."""

from collections.abc import Sequence

import psycopg
import pytest

from support.postgres import Database
from ucm_postgres.doctor import Finding, examine

READ = "current_setting('app.user_id', true)"
SAFE = f"nullif({READ}, '')"

TAKES_UNSET = [
    f"{READ} is null or user_id = {READ}",
    f"user_id = coalesce({SAFE}, user_id)",
    f"user_id is not distinct from {READ}",
    f"user_id is not distinct from {SAFE}",
    f"user_id = {READ}",  # an owner that is the empty text
    f"user_id = coalesce({READ}, '')",
    f"case when {READ} = '' then true else user_id = {READ} end",
    f"(user_id <> {SAFE}) is not true",
    "user_id = current_setting('app.user_id')",
]

OPEN = ["true", "user_id is not null", f"{READ} is not null", f"{SAFE} <> ''", "body is null"]

# True for whose id is like another's, or of one form: (condition, what the doctor says that it takes for the same).
ALIKE = [
    (f"lower(user_id) = lower({SAFE})", "upper and lower case"),
    (f"user_id like {SAFE}", "the id % as a pattern"),
    (f"user_id like coalesce({SAFE}, '%')", "the id % as a pattern"),
    (f"user_id ~ ('^' || {SAFE} || '$')", "the id .* as an expression"),
    (f"user_id like {SAFE} || '%'", "begins with the other"),
    (f"starts_with({SAFE}, user_id)", "begins with the other"),
    (f"user_id::varchar(8) = {SAFE}::varchar(8)", "that begin alike"),
    (f"user_id = any (string_to_array({SAFE}, ','))", "with a comma"),
    (f"{SAFE}::uuid is not null", ""),
    (f"{SAFE}::int > 0", ""),
]

SOUND = [
    f"user_id = {SAFE}",
    f"user_id = {SAFE} or body = 'for all'",
    f"user_id is null or user_id = {SAFE}",  # what is nobody's is for all
    f"{SAFE} is not null and user_id = {READ}",
    f"user_id = any (array[{SAFE}])",
    "user_id = current_setting('app.user_id')::uuid::text",  # an error where it is unset or empty
    "false",
    "1 / (case when user_id is null then 1 else 0 end) = 2",  # an error lets nothing through
]


def look(database: Database) -> tuple[Finding, ...]:
    with psycopg.connect(database.app.dsn) as connection:
        return examine(connection)


def keys(found: Sequence[Finding]) -> list[str]:
    return [finding.key for finding in found]


def mend(database: Database, found: Sequence[Finding]) -> None:
    for finding in found:
        database.execute(finding.sql)


def make_tables(database: Database, conditions: Sequence[str], policy: str) -> None:
    """A table for each condition, t0 and so on, with a policy like `policy`, where {} stands for the condition."""
    for number, condition in enumerate(conditions):
        table = f"t{number}"
        database.execute(
            f"create table {table} (user_id text, body text);"
            f"grant select, insert, update, delete on {table} to {{app}};"
            f"alter table {table} enable row level security, force row level security;"
            f"create policy p on {table} {policy.replace('{}', condition).replace('{table}', table)}"
        )


class TestConditions:
    def test_that_take_an_unset_setting_for_a_match(self, database: Database) -> None:
        make_tables(database, TAKES_UNSET, "using ({})")
        found = look(database)
        assert sorted(keys(found)) == [f"unset-matches:public.t{number}.p" for number in range(len(TAKES_UNSET))]
        assert {finding.severity for finding in found} == {"serious"}
        mend(database, found)
        assert look(database) == ()
        with psycopg.connect(database.app.dsn) as connection:
            for number in range(len(TAKES_UNSET)):  # as before, for who is bound
                connection.execute("select set_config('app.user_id', 'alice', true)")
                connection.execute(f"insert into t{number} values ('alice', 'hers')".encode())
                assert connection.execute(f"select body from t{number}".encode()).fetchall() == [("hers",)]

    def test_that_hold_for_rows_of_others_are_rewritten_where_there_is_no_other(self, database: Database) -> None:
        make_tables(database, OPEN, "using ({})")
        found = look(database)
        assert sorted(keys(found)) == [f"policy-open:public.t{number}.p" for number in range(len(OPEN))]
        for finding in found:
            table = finding.subject.removesuffix(".p")
            assert finding.sql.startswith(f"alter policy p on {table} using (user_id = (select nullif(")
        mend(database, found)
        assert look(database) == ()

    def test_that_hold_for_rows_of_others_are_dropped_beside_one_that_does_not(self, database: Database) -> None:
        make_tables(database, OPEN, f"using (user_id = {SAFE}); create policy q on {{table}} for select using ({{}})")
        found = look(database)
        assert sorted(keys(found)) == [f"policy-open:public.t{number}.q" for number in range(len(OPEN))]
        for finding in found:
            assert "(select)" in finding.problem
            assert finding.sql == f"drop policy q on {finding.subject.removesuffix('.q')};"
        mend(database, found)
        assert look(database) == ()

    def test_that_hold_for_whose_id_is_like_anothers(self, database: Database) -> None:
        make_tables(database, [condition for condition, _ in ALIKE], "using ({})")
        found = sorted(look(database), key=lambda finding: finding.subject)
        assert keys(found) == [f"policy-open:public.t{number}.p" for number in range(len(ALIKE))]
        for finding, (_, says) in zip(found, ALIKE, strict=True):
            assert says in finding.problem
            assert ("takes for the same" in finding.problem) is bool(says)
        mend(database, found)
        assert look(database) == ()

    def test_that_are_sound(self, database: Database) -> None:
        make_tables(database, SOUND, "using ({})")
        assert look(database) == ()


class TestCommands:
    @pytest.mark.parametrize("clause", ["for insert with check (true)", "for delete using (true)"])
    def test_each_is_judged(self, database: Database, clause: str) -> None:
        database.execute(f"create policy p on notes {clause}")
        (finding,) = look(database)
        assert finding.key == "policy-open:public.notes.p"
        assert f"({clause.split()[1]})" in finding.problem

    def test_an_update_that_gives_rows_away(self, database: Database) -> None:
        database.execute(f"create policy p on notes for update using (user_id = {SAFE}) with check (true)")
        (finding,) = found = look(database)
        assert finding.key == "policy-open:public.notes.p"
        assert "(update)" in finding.problem
        mend(database, found)
        assert look(database) == ()

    def test_a_restrictive_policy_takes_back_what_others_let_through(self, database: Database) -> None:
        database.execute("create policy p on notes using (true)")
        assert keys(look(database)) == ["policy-open:public.notes.p"]
        database.execute(f"create policy r on notes as restrictive using (user_id = {SAFE})")
        assert look(database) == ()

    def test_a_policy_for_another_role_does_not_count(self, database: Database) -> None:
        reporting = database.login("reporting", "nologin")
        database.execute(f"create policy p on notes for select to {reporting.user} using (true)")
        assert look(database) == ()
        database.execute(f"grant {reporting.user} to {database.app.user}", as_=database.superuser)
        assert keys(look(database)) == ["policy-open:public.notes.p"]


class TestColumns:
    def test_of_any_type(self, database: Database) -> None:
        kinds = ["uuid", "integer", "bigint", "varchar(40)", "numeric", "text"]
        for number, kind in enumerate(kinds):
            database.execute(
                f"create table t{number} (user_id {kind}, n int);"
                f"grant select, insert, update, delete on t{number} to {{app}}"
            )
        found = look(database)
        assert keys(found) == [f"row-security-off:public.t{number}" for number in range(len(kinds))]
        mend(database, found)
        assert look(database) == ()
        for number in range(len(kinds)):
            database.execute(f"create policy p on t{number} using (user_id is not null)")
        assert sorted(keys(look(database))) == [f"policy-open:public.t{number}.p" for number in range(len(kinds))]

    def test_a_child_table_without_one_is_judged_by_its_policy(self, database: Database) -> None:
        database.execute(
            "create table lines (note bigint, body text); grant select on lines to {app};"
            "alter table lines enable row level security, force row level security;"
            "create policy of_note on lines using (exists (select from notes where notes.id = lines.note))"
        )
        assert look(database) == ()
        database.execute(f"create policy p on lines for select using ({READ} is null or body = {READ})")
        (finding,) = found = look(database)
        assert finding.key == "unset-matches:public.lines.p"
        mend(database, found)
        assert look(database) == ()
        database.execute("drop policy p on lines; create policy q on lines for select using (body = " + SAFE + ")")
        database.execute("create policy p on lines for select using (true)")
        (finding,) = found = look(database)
        assert finding.key == "policy-open:public.lines.p"
        mend(database, found)
        assert look(database) == ()

    def test_names_that_need_quotes(self, database: Database) -> None:
        database.execute(
            'create schema "My %s"; create table "My %s"."no""tes" (user_id text, "order" int);'
            'grant usage on schema "My %s" to {app}; grant select on "My %s"."no""tes" to {app};'
            'alter table "My %s"."no""tes" enable row level security, force row level security;'
            """create policy "p %s" on "My %s"."no""tes" using ("no""tes"."order" is null)""",
            as_=database.superuser,
        )
        (finding,) = look(database)
        assert finding.key == 'policy-open:"My %s"."no""tes"."p %s"'
        database.execute(finding.sql, as_=database.superuser)
        assert look(database) == ()

    def test_a_type_that_takes_no_made_up_values_is_said(self, database: Database) -> None:
        database.execute(
            "create domain filled as text not null; create table strict (user_id text, body filled);"
            f"alter table strict enable row level security, force row level security;"
            f"create policy p on strict using (user_id = {SAFE}); grant select on strict to {{app}}"
        )
        (finding,) = look(database)
        assert (finding.key, finding.severity) == ("not-judged:public.strict", "warning")

    def test_a_table_in_a_schema_that_is_closed_cannot_be_reached(self, database: Database) -> None:
        database.execute(
            "create schema closed; create table closed.t (user_id text); grant select on closed.t to {app}",
            as_=database.superuser,
        )
        assert look(database) == ()
        database.execute("grant usage on schema closed to {app}", as_=database.superuser)
        assert keys(look(database)) == ["row-security-off:closed.t"]


class TestRows:
    def test_that_are_visible_to_nobody_in_particular_are_found_though_no_condition_shows_it(
        self, database: Database
    ) -> None:
        database.execute("create policy p on notes for select using (body = 'shown')")
        database.execute("insert into notes (user_id, body) values ('alice', 'shown')", as_=database.superuser)
        (finding,) = found = look(database)
        assert finding.key == "visible:public.notes"
        assert "alice" not in str(finding)
        mend(database, found)
        assert keys(look(database)) == ["shared:public.notes"]  # for who is bound, as before

    def test_that_are_visible_to_a_stranger_are_for_judging(self, database: Database) -> None:
        """What a condition asks of other columns is not seen in rows that are made up."""
        database.execute(f"create policy p on notes for select using (id > 0 and {SAFE} is not null)")
        assert look(database) == ()
        database.execute("insert into notes (user_id, body) values ('alice', 'shown')", as_=database.superuser)
        (finding,) = look(database)
        assert (finding.key, finding.severity) == ("shared:public.notes", "info")
        assert "alice" not in str(finding)

    def test_a_function_that_reads_the_setting_is_seen_through(self, database: Database) -> None:
        database.execute(
            f"create function me() returns text stable language sql as $$select {READ}$$;"
            "create table lines (body text); grant select on lines to {app};"
            "alter table lines enable row level security, force row level security;"
            "create policy p on lines for select using (me() is null or body = me())"
        )
        assert keys(look(database)) == ["unset-matches:public.lines.p"]

    def test_a_function_that_looks_for_its_tables_along_the_search_path(self, database: Database) -> None:
        database.execute(
            "create table switches (is_on boolean); insert into switches values (true);"
            "grant select on switches to {app};"
            "create function is_on() returns boolean stable language plpgsql as"
            " 'begin return (select bool_or(is_on) from switches); end';"
            "create policy p on notes for select using (is_on())"
        )
        assert keys(look(database)) == ["policy-open:public.notes.p"]

    def test_a_column_whose_name_needs_quotes(self, database: Database) -> None:
        database.execute(
            'drop table notes; create table t ("who""" text); grant select, insert on t to {app};'
            "alter table t enable row level security, force row level security;"
            'create policy p on t using ("who""" is not null)'
        )
        with psycopg.connect(database.app.dsn) as connection:
            (finding,) = examine(connection, user_column='who"')
        assert finding.key == "policy-open:public.t.p"
        mend(database, [finding])
        with psycopg.connect(database.app.dsn) as connection:
            assert examine(connection, user_column='who"') == ()
