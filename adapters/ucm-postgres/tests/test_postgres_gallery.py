"""The planted bug of examples/gallery that needs PostgreSQL: `SET` without `LOCAL` shows alice's rows to bob.

The others are tested in tests/test_gallery.py.
"""

import pytest

from examples.gallery import GALLERY
from support.gallery import assert_kept_apart, drive, inspect, leaked
from support.postgres import PostgresServer

(BUG,) = (bug for bug in GALLERY if bug.needs == "GALLERY_POSTGRES")

with_and_without_the_middleware = pytest.mark.parametrize("managed", [False, True], ids=["alone", "managed"])


@with_and_without_the_middleware
def test_the_planted_app_shows_alice_s_rows_to_bob(postgres_server: PostgresServer, managed: bool) -> None:
    with postgres_server.database(notes=False) as database:
        received = drive(BUG, planted=True, managed=managed, env={"GALLERY_POSTGRES": database.owner.dsn})

    assert not BUG.cured
    assert leaked(received) == {("bob", "alice")}


@with_and_without_the_middleware
def test_the_clean_twin_shows_everybody_their_own(postgres_server: PostgresServer, managed: bool) -> None:
    with postgres_server.database(notes=False) as database:
        received = drive(BUG, planted=False, managed=managed, env={"GALLERY_POSTGRES": database.owner.dsn})

    assert_kept_apart(received)


def test_the_guard_names_the_row_that_bob_is_shown(postgres_server: PostgresServer) -> None:
    with postgres_server.database(notes=False) as database:
        inspection = inspect(BUG, planted=True, env={"GALLERY_POSTGRES": database.owner.dsn})

    hits = [event for event in inspection.events if event["event"] == "egress" and "receiver" in event]
    assert {(hit["receiver"], hit["route"], hit["field"]) for hit in hits} == {("bob", "/notices", "$[0].api_key")}
    assert inspection.findings == []  # what is shared is a setting in the database


def test_nothing_is_named_of_the_clean_twin(postgres_server: PostgresServer) -> None:
    with postgres_server.database(notes=False) as database:
        inspection = inspect(BUG, planted=False, env={"GALLERY_POSTGRES": database.owner.dsn})

    assert inspection.findings == []
    assert not [event for event in inspection.events if event["outcome"] != "ok"]
