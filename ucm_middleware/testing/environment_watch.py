"""Finds the environment variables that a test has changed, and puts them back."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Final

from ucm_middleware.testing.leaks import Owner

PYTEST_OWN: Final = frozenset({"PYTEST_CURRENT_TEST"})
"""What pytest itself sets and removes for each test."""


class EnvironmentWatch:
    """Compares ``os.environ`` before and after each test."""

    __slots__ = ("_before", "_ended", "_expected")

    def __init__(self) -> None:
        self._expected: dict[str, str] = {}
        self._before: dict[Owner, dict[str, str | None]] = {}  # of what each owner changed; None where nothing was
        self._ended: dict[str, Owner] = {}  # who had changed a variable, and was torn down since the last test

    def begin(self) -> None:
        """A test begins here."""
        self._expected = _environment()

    @contextmanager
    def owned_by(self, owner: Owner) -> Generator[None]:
        """What is changed in the block, if it ends well, is as this owner wants it."""
        before = _environment()
        yield
        after = _environment()
        if changed := _changed(before, after):
            self._before[owner] = {variable: before.get(variable) for variable in changed}
            _overlay(self._expected, {variable: after.get(variable) for variable in changed})

    def disown(self, owner: Owner) -> None:
        """The owner has ended: what it changed must be as it was before."""
        before = self._before.pop(owner, {})
        _overlay(self._expected, before)
        self._ended.update(dict.fromkeys(before, owner))

    def findings(self) -> list[str]:
        """Which variables are left changed, now that a test has ended, by name: a value may be a secret.

        They are put back.
        """
        now = _environment()
        changed = _changed(self._expected, now)
        for variable in changed:
            if variable in self._expected:
                os.environ[variable] = self._expected[variable]
            else:
                del os.environ[variable]
        told = [_told(variable, self._expected, now, self._ended.get(variable)) for variable in changed]
        self._ended.clear()
        return [f"a changed environment, now put back: {', '.join(told)}"] if told else []


def _environment() -> dict[str, str]:
    return {variable: value for variable, value in os.environ.items() if variable not in PYTEST_OWN}


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(variable for variable in {*before, *after} if before.get(variable) != after.get(variable))


def _told(variable: str, before: Mapping[str, str], after: Mapping[str, str], owner: Owner | None) -> str:
    what = "added" if variable not in before else "changed" if variable in after else "removed"
    return f"{variable} ({what})" if owner is None else f"{variable} ({what} by {owner.name})"


def _overlay(environment: dict[str, str], values: Mapping[str, str | None]) -> None:
    for variable, value in values.items():
        if value is None:
            environment.pop(variable, None)
        else:
            environment[variable] = value
