"""The benchmarks of the cluster run, tell what they measured, and hold it against their limits. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def figures(benchmark: str, *options: str, folder: Path) -> dict[str, Any]:
    file = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--json", str(file), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_an_open_waits_for_one_command_and_a_message_for_none(tmp_path: Path) -> None:
    found = figures("cluster", "--rounds", "30", "--opens", "100", "--seconds", "0", folder=tmp_path)
    assert found["commands_an_open_waits_for"] == 1
    assert found["other_commands_an_open"] == 0
    assert found["commands_a_message"] == 0
    assert found["renewals"].keys() == {"1", "3"}
    assert found["p50_us"].keys() == found["p50_us_network"].keys()


def test_the_simulation_counts_what_it_was_given(tmp_path: Path) -> None:
    small = ["--workers", "10", "--users", "20000", "--sampled-workers", "10", "--sampled-seconds", "20"]
    found = figures("cluster_simulation", *small, "--measured", "400", folder=tmp_path)
    users, between = found["assumptions"]["users"], found["assumptions"]["seconds_between_requests"]
    new_connections = users * found["assumptions"]["connected"] / found["assumptions"]["connection_seconds"]
    assert found["commands_a_second"]["acquire"] == pytest.approx(users / between + new_connections, rel=0.05)
    assert found["lost_leases"] == 0
    assert found["restored_leases"] > 0
    assert sum(found["memory_bytes"].values()) > users
