"""Runs of the certifier in tests: on real servers, for a short while, without a terminal."""

import asyncio
from dataclasses import replace
from pathlib import Path

from ucm_middleware.certify.certifying import Options, Result, certify
from ucm_middleware.certify.coverage import Coverage

ROOT = Path(__file__).parents[2]


class Unseen:
    """Progress that nobody looks at."""

    def stage(self, what: str, seconds: float | None) -> None:
        """Nothing."""

    def done(self, coverage: Coverage, findings: int) -> None:
        """Nothing."""


def certified(options: Options, *, with_ucm: bool = False) -> Result:
    """Run it to its end."""
    return asyncio.run(certify(replace(options, app_dir=ROOT), Unseen(), with_ucm=with_ucm))
