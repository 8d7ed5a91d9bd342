"""The examples run as their README says: the demonstration proves its point, the quickstarts know their callers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demonstration() -> subprocess.CompletedProcess[str]:
    """A short demonstration that has ended."""
    command = [sys.executable, "-m", "examples.helpdesk.demo", "--requests", "80", "--seed", "7", "--json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def figures(demonstration: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the demonstration reports."""
    assert demonstration.stdout, demonstration.stderr
    report: dict[str, Any] = json.loads(demonstration.stdout)
    return report


def test_the_demonstration_succeeds(demonstration: subprocess.CompletedProcess[str]) -> None:
    """By its own judgement, which the exit status tells."""
    assert demonstration.returncode == 0, demonstration.stderr


def test_nothing_leaks_with_the_middleware(figures: dict[str, Any]) -> None:
    """Nobody is shown data of another, and everybody is shown their own."""
    shown = figures["with"]["shown"]

    assert figures["with"]["leaks"] == figures["with"]["failures"] == 0
    for user in ("alice", "bob", "carol"):
        assert set(shown[user]) - {"nobody"} == {user}
    assert set(shown["nobody"]) == {"nobody"}


def test_the_same_drive_leaks_without_the_middleware(figures: dict[str, Any]) -> None:
    """The drive can see a leak: users see each other's data, and somebody without a token sees a user's."""
    shown = figures["without"]["shown"]

    assert figures["without"]["leaks"] > 0
    assert set(shown["nobody"]) & {"alice", "bob", "carol"}
    assert any(set(shown[user]) - {user, "nobody"} for user in ("alice", "bob", "carol"))


def test_all_that_was_opened_is_closed(figures: dict[str, Any]) -> None:
    """Contexts and the database connections entered on them, those of callers who hung up included."""
    contexts = figures["with"]["contexts"]

    assert contexts["opened"] == contexts["closed"] >= figures["with"]["requests"] * 0.9
    assert contexts["connections_opened"] == contexts["connections_closed"] > 0


def test_the_trail_of_one_user_is_that_user_s(figures: dict[str, Any]) -> None:
    """Alice's audit trail begins and ends her contexts, and says that the supervisor looked."""
    trail = figures["with"]["trail"]

    assert trail["user_id"] == "alice"
    assert {"opened", "closed", "privileged"} <= {event["event"] for event in trail["events"]}


def test_a_server_that_cannot_start_is_reported(tmp_path: Path) -> None:
    """Exit status 2 and uvicorn's own words, not a traceback of the demonstration."""
    (tmp_path / "httptools.py").write_text("raise ImportError('httptools is broken')\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "examples.helpdesk.demo", "--requests", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2, done.stderr + done.stdout
    assert "uvicorn did not start" in done.stdout
    assert "httptools is broken" in done.stdout


@contextmanager
def running(script: str) -> Generator[str]:
    """Run an example that serves on the port in the environment; gives its URL."""
    command = [sys.executable, str(ROOT / "examples" / script)]
    with subprocess.Popen(command, env=os.environ | {"PORT": "0"}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        printed: list[str] = []
        try:
            for line in process.stderr:
                printed.append(line)
                if found := re.search(r"http://[\d.]+:\d+", line):
                    yield found[0]
                    break
            else:
                pytest.fail(f"{script} ended:\n{''.join(printed)}")
        finally:
            process.terminate()


@pytest.mark.parametrize("script", ["quickstart_starlette.py", "quickstart_fastapi.py"])
def test_a_quickstart_knows_its_callers(script: str) -> None:
    """Each caller is greeted by name in a request of their own; whoever has no token is refused."""
    with running(script) as url, httpx.Client(base_url=url, trust_env=False) as client:
        alice, bob = (
            client.get("/", headers={"Authorization": f"Bearer token-of-{user}"}).json() for user in ("alice", "bob")
        )
        refused = client.get("/")

    assert (alice["greeting"], bob["greeting"]) == ("Hello, alice", "Hello, bob")
    assert alice["request"] != bob["request"]
    assert refused.status_code == 401
