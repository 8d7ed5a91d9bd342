"""Matrices: tests of thousands of cases, which run in full on one Python, and in part where the environment says so."""

import os
from collections.abc import Iterable

import pytest


def step_of(given: str | None) -> int:
    """One case in how many is run: all of them without a text. Raises ValueError for what is no number from 1 on."""
    if given is None:
        return 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"UCM_TEST_MATRICES must say one case in how many is run, such as 5, not {given!r}")
    return int(given)


STEP = step_of(os.environ.get("UCM_TEST_MATRICES"))
"""Of each test with the marker ``matrix``: `tox.ini` sets the variable where a part is to do."""


def part_of(items: Iterable[pytest.Item], step: int) -> set[pytest.Item]:
    """What is run: every test without the marker, and of one with it each ``step``-th case, always the same ones."""
    kept: set[pytest.Item] = set()
    met: dict[str, int] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        number = met[name] = met.get(name, -1) + 1
        if item.get_closest_marker("matrix") is None or number % step == 0:
            kept.add(item)
    return kept
