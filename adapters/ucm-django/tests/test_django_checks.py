"""What the system checks, and each connection, refuse."""

from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.db import connection, connections
from django.test import override_settings

from django_project import PLAIN, on_database
from support.postgres import Database
from ucm_django import conf
from ucm_middleware import ConfigurationError
from ucm_postgres import Binding

SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"
AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"
BIND = "ucm_django.middleware.BindUserMiddleware"


def found() -> list[tuple[str | None, str]]:
    return [(message.id, message.msg) for message in run_checks() if (message.id or "").startswith("ucm_django")]


def test_a_project_that_is_tied_passes() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("UCM_BINDING", {"settings": "app.user_id"}, "unexpected keyword argument"),
        ("UCM_BINDING", {"setting": "search_path"}, "no custom setting"),
        ("UCM_BINDING", "app.user_id", "UCM_BINDING is a str"),
        ("UCM_UNBOUND_DATABASES", "default", "give a list of aliases"),
        ("UCM_UNBOUND_DATABASES", ["defualt"], "names defualt, which DATABASES has not"),
        ("UCM_ANONYMOUS", "allow", "give 'refuse' or 'nobody'"),
        ("UCM_RESET", "never", "give 'change' or 'begin'"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: object, says: str) -> None:
    with override_settings(**{name: value}):
        ((id_, message),) = found()
    assert id_ == "ucm_django.E001"
    assert says in message


@pytest.mark.parametrize(
    ("name", "value"), [("UCM_BINDING", "app.user_id"), ("UCM_UNBOUND_DATABASES", "default"), ("UCM_RESET", "never")]
)
def test_the_checks_get_a_wrapper_whatever_is_wrong_and_nothing_connects(
    database: Database, name: str, value: object
) -> None:
    """Django's own checks ask the wrapper what the database can, before ours have named what is wrong."""
    with on_database(database.app), override_settings(**{name: value}):
        assert connections["default"].features.supports_json_field
        with pytest.raises(ConfigurationError, match=name), connection.cursor():
            pass
        assert connection.connection is None


@pytest.mark.parametrize(
    ("value", "says"),
    [("nowhere.manager", "dotted path"), (f"{__name__}.BIND", "leads to, a str"), (3, "an? int|a int")],
)
def test_a_manager_that_is_none_is_refused(value: object, says: str) -> None:
    with override_settings(UCM_MANAGER=value), pytest.raises(ConfigurationError, match=says):
        conf.manager()


def test_the_binding_may_be_an_object() -> None:
    with override_settings(UCM_BINDING=Binding("app.who")):
        assert conf.binding().setting == "app.who"


def test_a_database_that_is_untied_must_be_declared(database: Database) -> None:
    with on_database(database.app, ENGINE=PLAIN):
        ((id_, message),) = found()
        assert (id_, "ucm_django.postgresql" in message) == ("ucm_django.E002", True)
        # A server is started without the checks.
        with pytest.raises(ConfigurationError, match="UCM_UNBOUND_DATABASES"), connection.cursor():
            pass
        assert connection.connection is None
    with override_settings(UCM_UNBOUND_DATABASES=["default"]):
        with on_database(database.app, ENGINE=PLAIN), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert found() == []
        with on_database(database.app), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            ((id_, message),) = found()
            assert id_ == "ucm_django.W001"


def test_sqlite_has_no_row_policies_and_says_so(database: Database, tmp_path: Path) -> None:
    sqlite: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db")}
    with on_database(database.app, **sqlite):
        ((id_, message),) = found()
        assert id_ == "ucm_django.E002"
        assert "on sqlite, which ucm-django cannot tie to users" in message
        with pytest.raises(ConfigurationError, match="no row policies"), connection.cursor():
            pass
    with override_settings(UCM_UNBOUND_DATABASES=["default"]), on_database(database.app, **sqlite):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        assert found() == []


@pytest.mark.parametrize("names", [[BIND], [SESSIONS, BIND, AUTHENTICATION]])
def test_the_middleware_comes_after_the_login(names: list[str]) -> None:
    with override_settings(MIDDLEWARE=names):
        assert "ucm_django.E003" in dict(found())
    with override_settings(MIDDLEWARE=[SESSIONS, AUTHENTICATION, BIND]):
        assert found() == []
