"""The gallery of planted bugs: each app hands alice's key to bob, its clean twin nobody's to anybody, on a real server.

`set_without_local` needs PostgreSQL: adapters/ucm-postgres/tests/test_postgres_gallery.py.
"""

from pathlib import Path

import pytest

from examples.gallery import GALLERY, Bug
from examples.gallery.drive import main
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


@pytest.mark.parametrize(("factory", "status"), [("planted", 1), ("clean", 0)])
def test_the_command_of_the_readme_tells_them_apart(
    factory: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is given the app by its name, as in the README; the exit status says whether it leaked."""
    with start_server(f"examples.gallery.global_cache:{factory}", app_dir=ROOT, options=("--factory",)) as server:
        assert main("global_cache", server.url) == status
    assert ("bob was sent the keys of alice" in capsys.readouterr().out) == bool(status)


def test_the_command_names_the_bugs_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("global-cache", "http://127.0.0.1:1") == 2
    assert "global_cache" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in GALLERY])
def test_the_table_tells_of_each(bug: Bug) -> None:
    """What the README says is what the registry says."""
    cured = "yes" if bug.cured else "no"
    row = f"| `{bug.name}` | {bug.title} | {bug.wrong} | {bug.shown_by} | {cured} |"
    assert row in README.read_text()
