"""Who a statement runs for, where it is not simply the user of the context."""

import json
import secrets
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import httpx
import psycopg
import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection, migrations, transaction
from django.db.migrations.state import ProjectState
from django.test import Client, override_settings

from django_notebook import bodies, manager, owners, write
from django_project import on_database, seed
from support.contexts import running_as, visitor
from support.postgres import Database
from test_django_asgi import serving
from ucm_django import nobody, unbound
from ucm_middleware import (
    EVERYONE,
    ConfigurationError,
    ContextNotFoundError,
    InvalidContextError,
    UserContextManager,
    managed_user_context,
)
from ucm_postgres import PURPOSE, Binding, install_keys, policy_sql, setup_sql

GRANTS = """
grant select, insert, update, delete on all tables in schema public to {app};
grant usage on all sequences in schema public to {app};
"""


@pytest.fixture
def accounts(database: Database) -> Database:
    """The tables of Django's own apps, made by the owner; Ann has the id 1, Ben 2."""
    with override_settings(UCM_UNBOUND_DATABASES=["default"]), on_database(database.owner):
        call_command("migrate", verbosity=0)
        for name in ("ann", "ben"):
            User.objects.create_user(name, password="secret")
    database.execute(GRANTS)
    seed(database, "1", "2")
    return database


@pytest.fixture
def anybody() -> Iterator[None]:
    with override_settings(UCM_ANONYMOUS="nobody"):
        yield


def test_nobody_s_statements_match_no_row(notebook: Database, manager: UserContextManager) -> None:
    seed(notebook, "alice")
    with running_as(manager, "alice"):
        assert owners() == ["alice"]
        with nobody():
            assert owners() == []
            with transaction.atomic():
                assert owners() == []
        assert owners() == ["alice"]
    with pytest.raises(ContextNotFoundError), nobody():
        owners()


@pytest.mark.usefixtures("anybody")
def test_an_anonymous_context_is_nobody_where_the_project_says_so_and_may_still_learn_its_user(
    notebook: Database, manager: UserContextManager
) -> None:
    seed(notebook, "alice")
    context = visitor(manager)
    with managed_user_context(context):
        assert owners() == []
        with connection.cursor() as cursor:
            cursor.execute("SET app.user_id = 'alice'")
        assert owners() == []
        context.bind("bob")
        write("his")
        assert owners() == ["bob"]
    with managed_user_context(visitor(manager)), connection.cursor() as cursor:
        assert owners() == []
        cursor.execute("SELECT current_setting('app.user_id', true)")
        assert cursor.fetchone() == ("",)


def test_unbound_statements_are_on_record_and_only_in_their_block(notebook: Database) -> None:
    seed(notebook, "alice")
    with pytest.raises(InvalidContextError, match="reason"), unbound(reason=" "):
        bodies()
    with unbound(reason="nightly report"):
        assert bodies() == []  # the login's policies hold all the same
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('app.user_id', true)")
            assert cursor.fetchone()[0] in (None, "")
    with pytest.raises(ContextNotFoundError):
        bodies()
    with manager.privileged(reason="the test looks", users=EVERYONE):
        trail = manager.get_system_trail()
    assert [event["event"] for event in trail if event.get("reason") == "nightly report"] == ["privileged"]


def test_unbound_needs_a_manager() -> None:
    with (
        override_settings(UCM_MANAGER=None),
        pytest.raises(ConfigurationError, match="UCM_MANAGER"),
        unbound(reason="nightly report"),
    ):
        pass


def test_a_session_is_clean_on_both_sides_of_an_unbound_block(notebook: Database) -> None:
    scripts = UserContextManager()
    with running_as(scripts, "alice"), connection.cursor() as cursor:
        cursor.execute("SET search_path = pg_temp")
    with unbound(reason="the test looks"), connection.cursor() as cursor:
        cursor.execute("SHOW search_path")
        assert cursor.fetchone() == ('"$user", public',)
        cursor.execute("SET app.user_id = 'alice'")
        cursor.execute("SET statement_timeout = 1234")
    with running_as(scripts, "bob"), connection.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("0",)


def test_a_context_that_is_entered_in_an_unbound_block_is_its_user_s(notebook: Database) -> None:
    scripts = UserContextManager()
    with unbound(reason="a mail to each user"):
        for user in ("alice", "bob"):
            with running_as(scripts, user):
                write(f"to {user}")
                assert owners() == [user]
        assert owners() == []
    with running_as(scripts, "alice"), nobody():
        assert owners() == []
        with scripts.privileged(reason="the test crosses users", users=["bob"]), running_as(scripts, "bob"):
            assert owners() == ["bob"]


def test_who_inherited_a_block_has_it_no_longer_than_the_block_lasts(notebook: Database) -> None:
    with unbound(reason="the test looks"):
        inherited = copy_context()
        assert inherited.run(owners) == []
    with pytest.raises(ContextNotFoundError):
        inherited.run(owners)


def test_signed_ids_and_policies_from_a_migration(database: Database) -> None:
    binding = Binding("app.signed", signed=True)
    scripts = UserContextManager(secret=secrets.token_urlsafe(32))

    def run(editor: Any) -> None:
        for sql in (
            "CREATE TABLE letters (user_id text NOT NULL, body text)",
            policy_sql("letters", binding=binding),
            f'GRANT SELECT, INSERT ON letters TO "{database.app.user}"',
        ):
            operation = migrations.RunSQL(sql)
            operation.database_forwards("notebook", editor, ProjectState(), ProjectState())

    with psycopg.connect(database.superuser.dsn) as admin:
        admin.execute(setup_sql(database.app.user, database.owner.user, binding=binding).encode())
        install_keys(admin, scripts.subkeys(PURPOSE))
    with (
        override_settings(UCM_UNBOUND_DATABASES=["default"]),
        on_database(database.owner),
        connection.schema_editor(atomic=True) as editor,
    ):
        run(editor)
    with override_settings(UCM_BINDING=binding), on_database(database.app):
        for user in ("alice", "bob"):
            with running_as(scripts, user), transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("INSERT INTO letters VALUES (%s, 'dear')", [user])
                cursor.execute("SELECT user_id FROM letters")
                assert cursor.fetchall() == [(user,)]
                cursor.execute("SET LOCAL app.signed = 'alice'")  # as an injection would
                cursor.execute("SELECT user_id FROM letters")
                assert cursor.fetchall() == []
        with running_as(scripts, "bob"), nobody(), connection.cursor() as cursor:
            cursor.execute("SELECT user_id FROM letters")
            assert cursor.fetchall() == []


LOGIN = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "ucm_django.middleware.BindUserMiddleware",
]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_django_s_login_is_the_identity(accounts: Database, asynchronous: bool) -> None:
    a = "a" if asynchronous else ""
    pool: dict[str, Any] = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 2}}}
    with (
        serving(accounts, {"MIDDLEWARE": LOGIN, "UCM_ANONYMOUS": "nobody"}, **pool) as server,
        httpx.Client(base_url=server.url) as ann,
        httpx.Client(base_url=server.url) as ben,
    ):
        assert ann.get(f"{a}listing").json()["notes"] == []
        # In the request that signs in, statements run for the user from the login on.
        assert ann.get(f"{a}sign_in?name=ann").json()["notes"] == ["secret of 1"]
        assert ben.get(f"{a}sign_in?name=ben").json()["notes"] == ["secret of 2"]
        for client, own in ((ann, "1"), (ben, "2"), (ann, "1")):
            seen = client.get(f"{a}listing").json()
            assert (seen["user"], seen["notes"]) == (own, [f"secret of {own}"])
        # Who was known to the middleware before, by a header here, has to be the same.
        assert ann.get(f"{a}listing", headers={"user": "1"}).json()["notes"] == ["secret of 1"]
        assert ann.get(f"{a}listing", headers={"user": "2"}).status_code == 409
        everything = ben.get(f"{a}everything").json()
        assert everything["raw"] == ["2"]


def test_who_is_not_signed_in_is_told_so(accounts: Database) -> None:
    with serving(accounts, {"MIDDLEWARE": LOGIN}) as server:
        answer = httpx.get(f"{server.url}/listing")
        assert (answer.status_code, json.loads(answer.text)) == (401, {"detail": "Valid credentials are required."})
        assert httpx.get(f"{server.url}/alisting").status_code == 401


def test_the_login_is_found_where_anonymous_statements_are_refused(
    accounts: Database, manager: UserContextManager
) -> None:
    client = Client()
    with on_database(accounts.app):
        with unbound(reason="the test signs in"):
            client.force_login(User.objects.get(username="ann"))
        # Synchronously, in this process; asynchronously, on a server.
        with override_settings(MIDDLEWARE=LOGIN), managed_user_context(visitor(manager)):
            assert client.get("/listing").json() == {"user": "1", "notes": ["secret of 1"]}
    cookies = {name: morsel.value for name, morsel in client.cookies.items()}
    with serving(accounts, {"MIDDLEWARE": LOGIN}) as server, httpx.Client(base_url=server.url, cookies=cookies) as ann:
        assert ann.get("alisting").json()["notes"] == ["secret of 1"]
        assert httpx.get(f"{server.url}/alisting").status_code == 401
