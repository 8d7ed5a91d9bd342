"""``ucm certify`` finds what `SET` without `LOCAL` leaves on a connection, and nothing where it is `SET LOCAL`."""

import pytest

from examples.gallery import GALLERY
from examples.gallery.certify import cast
from examples.gallery.common import USERS
from support.certifying import certified
from support.postgres import PostgresServer
from ucm_middleware.certify.certifying import Options, Result
from ucm_middleware.errors import ConfigurationError

(BUG,) = (bug for bug in GALLERY if bug.needs is not None)
VARIABLE = "GALLERY_POSTGRES"


def run(server: PostgresServer, twin: str, *, database: str | None = VARIABLE, seconds: float = 4) -> Result:
    with server.database(notes=False) as fresh:
        env = {VARIABLE: fresh.owner.dsn}
        app = f"{BUG.module}:{twin}"
        return certified(Options(app, cast(), factory=True, seconds=seconds, seed=1, env=env, database=database))


@pytest.mark.timeout(120)
def test_the_planted_app_is_caught_by_its_rows_and_by_its_setting(postgres_server: PostgresServer) -> None:
    result = run(postgres_server, "planted")

    shown = {(each.finding.place.channel, each.finding.place.route): each for each in result.shown}
    assert set(shown) == {("body", "GET /notices"), ("setting", "GET /notices")}
    setting = shown["setting", "GET /notices"]
    assert setting.finding.place.detail == "app.user_id"
    assert set(setting.finding.pairs) <= {USERS, USERS[::-1]}
    assert setting.shortest.reproduced
    assert len(setting.shortest.steps) == 2
    assert "setting" not in result.coverage.not_looked_at


@pytest.mark.timeout(120)
def test_nothing_is_found_in_the_clean_twin(postgres_server: PostgresServer) -> None:
    result = run(postgres_server, "clean")

    assert result.shown == ()
    assert result.coverage.covered == 3
    assert "setting" not in result.coverage.not_looked_at


@pytest.mark.parametrize(
    ("database", "why"),
    [
        (None, "no --database-variable says where the application finds its PostgreSQL"),
        ("OTHER_DSN", "the application made no connection to the database that OTHER_DSN names"),
    ],
)
def test_what_is_not_looked_at_is_said(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, database: str | None, why: str
) -> None:
    monkeypatch.setenv("OTHER_DSN", "postgresql://nobody@127.0.0.1:1/none")
    result = run(postgres_server, "clean", database=database, seconds=1)
    assert result.coverage.not_looked_at["setting"] == why


def test_a_variable_that_is_not_set_is_refused(postgres_server: PostgresServer) -> None:
    with pytest.raises(ConfigurationError, match="--database-variable UNSET_DSN: it is not set"):
        run(postgres_server, "clean", database="UNSET_DSN", seconds=1)
