"""The certifier finds each planted bug of the gallery, whatever the seed, and nothing in the clean twins.

`tox run -e certify-gallery`: twenty seeds of ten seconds each on uvicorn, two on hypercorn and granian. It is not part
of a plain tox, since that takes most of an hour.
"""

import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from examples.gallery import GALLERY, Bug
from examples.gallery.certify import cast
from support.certifying import certified
from support.postgres import PostgresServer
from ucm_middleware.certify.certifying import Options, Result
from ucm_middleware.testing.server import ServerKind

SEEDS = {"uvicorn": int(os.environ.get("UCM_TEST_SEEDS", "20")), "hypercorn": 2, "granian": 2}
SECONDS = float(os.environ.get("UCM_TEST_SECONDS", "10"))

# The one bug that is uvicorn's as much as the application's: no other server reads on in the variables of an upload.
OF_UVICORN = {"request_variable"}

each_bug = pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in GALLERY])
each_kind = pytest.mark.parametrize("kind", ["uvicorn", "hypercorn", "granian"])


@contextmanager
def settings_of(bug: Bug, server: PostgresServer) -> Generator[dict[str, str]]:
    """The environment of an application, with a fresh database where it needs one."""
    if bug.needs is None:
        yield {}
    else:
        with server.database(notes=False) as database:
            yield {bug.needs: database.owner.dsn}


def run(bug: Bug, twin: str, kind: ServerKind, seed: int, server: PostgresServer) -> Result:
    app = f"{bug.module}:{twin}"
    with settings_of(bug, server) as env:
        options = Options(
            app,
            cast(),
            kind,
            factory=True,
            seconds=SECONDS,
            shorten=0,
            first=True,
            seed=seed,
            env=env,
            database=bug.needs,
        )
        return certified(options)


@each_bug
@each_kind
def test_the_planted_app_is_caught(bug: Bug, kind: ServerKind, postgres_server: PostgresServer) -> None:
    if kind != "uvicorn" and bug.name in OF_UVICORN:
        pytest.skip("this bug does not show on other servers than uvicorn")
    found: Counter[int] = Counter()
    for seed in range(SEEDS[kind]):
        found[seed] += len(run(bug, "planted", kind, seed, postgres_server).shown)
    missed = [seed for seed, number in found.items() if not number]
    print(f"{bug.name} on {kind}: missed with seeds {missed} of {SEEDS[kind]}")
    assert len(missed) <= SEEDS[kind] // 20


@each_bug
@each_kind
def test_nothing_is_found_in_the_clean_twin(bug: Bug, kind: ServerKind, postgres_server: PostgresServer) -> None:
    for seed in range(SEEDS[kind]):
        result = run(bug, "clean", kind, seed, postgres_server)
        assert [shown.finding.place for shown in result.shown] == [], f"seed {seed}"
        assert result.coverage.covered
