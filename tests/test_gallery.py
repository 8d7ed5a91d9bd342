"""The gallery of planted bugs: each app hands alice's key to bob, its clean twin nobody's to anybody, on a real server.

`set_without_local` needs PostgreSQL: adapters/ucm-postgres/tests/test_postgres_gallery.py.
"""

from pathlib import Path

import pytest

from examples.gallery import GALLERY, Bug
from examples.gallery.drive import Drive
from support.gallery import assert_kept_apart, drive, every_bug, leaked
from ucm_middleware.testing import start_server

ROOT = Path(__file__).parents[1]
README = ROOT / "examples" / "gallery" / "README.md"


@every_bug
def test_the_planted_app_shows_alice_s_key_to_bob(bug: Bug) -> None:
    assert leaked(drive(bug, planted=True, managed=False)) == {(bug.receiver, bug.victim)}


@every_bug
def test_the_middleware_alone_cures_what_the_gallery_says(bug: Bug) -> None:
    expected = set() if bug.cured else {(bug.receiver, bug.victim)}
    assert leaked(drive(bug, planted=True, managed=True)) == expected


@every_bug
@pytest.mark.parametrize("managed", [False, True], ids=["alone", "managed"])
def test_the_clean_twin_shows_everybody_their_own(bug: Bug, managed: bool) -> None:
    assert_kept_apart(drive(bug, planted=False, managed=managed))


@pytest.mark.parametrize(("factory", "expected"), [("planted", {("bob", "alice")}), ("clean", set())])
def test_a_server_is_given_an_app_by_its_name(factory: str, expected: set[tuple[str, str]]) -> None:
    """As the README does, from the root of the repository."""
    bug = GALLERY[0]
    app = f"{bug.module}:{factory}"
    with start_server(app, app_dir=ROOT, options=("--factory",)) as server, Drive(server.url) as users:
        assert leaked(users.run(bug.drive)) == expected


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in GALLERY])
def test_the_table_tells_of_each(bug: Bug) -> None:
    """What the README says is what the registry says."""
    cured = "yes" if bug.cured else "no"
    row = f"| `{bug.name}` | {bug.title} | {bug.wrong} | {bug.shown_by} | {cured} |"
    assert row in README.read_text()
