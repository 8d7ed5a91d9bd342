"""What came back for a request."""

from dataclasses import dataclass
from typing import Final, Literal

Ending = Literal["complete", "dropped", "refused", "late", "endless", "dropped by us"]
"""Whole; the connection was lost; there was none; nothing more came in time; more came than is read; by plan."""

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` is 0 when no answer began. ``headers`` and ``body`` are what was read."""

    ending: Ending
    status: int = 0
    headers: Headers = ()
    body: bytes = b""

    @property
    def is_success(self) -> bool:
        return self.ending == "complete" and 200 <= self.status < 300


LARGEST: Final = 4 * 1024 * 1024
"""Bytes of a body that are read; a longer one is called endless, and dropped."""
