"""What the doctor finds, in the form in which it says it."""

from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["serious", "warning", "info"]

SEVERITIES: Final[tuple[Severity, ...]] = ("serious", "warning", "info")
"""From the worst on: *serious* lets one user reach what is another's, or all of it; a *warning* needs a mistake
elsewhere for that, or breaks the application; an *info* is for judging."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    ``code`` is a word for the kind. ``subject`` is the object's qualified name, quoted as SQL wants it. ``problem``
    says what is wrong. ``sql`` mends it, run by whoever may; it is empty where no SQL can, and ``problem`` says what
    can.
    """

    code: str
    severity: Severity
    subject: str
    problem: str
    sql: str = ""

    @property
    def key(self) -> str:
        """What it is accepted by, where it is meant to be so: ``code:subject``."""
        return f"{self.code}:{self.subject}"
