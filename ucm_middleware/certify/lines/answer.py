"""What came back for a request."""

import zlib
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
    def plain(self) -> bytes:
        """The body as it is read: without the compression that nobody asked for, as far as there is one."""
        coding = next((value for name, value in self.headers if name.lower() == b"content-encoding"), b"").lower()
        if coding not in (b"gzip", b"x-gzip", b"deflate"):
            return self.body
        try:
            return zlib.decompressobj(wbits=47).decompress(self.body, LARGEST)
        except zlib.error:
            return self.body

    @property
    def is_answered(self) -> bool:
        """Whether it succeeded, as a stream too that does not end."""
        return 200 <= self.status < 300 and (
            self.ending == "complete" or (self.ending in ("late", "endless") and bool(self.body))
        )

    @property
    def is_success(self) -> bool:
        return self.ending == "complete" and 200 <= self.status < 300


LARGEST: Final = 4 * 1024 * 1024
"""Bytes of a body that are read; a longer one is called endless, and dropped."""
