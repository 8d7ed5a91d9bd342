"""What the verifier asks of whatever keeps a ledger, and knows no more of it than this."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Stage = Literal["records", "database"]
"""What is being verified: the records, or the structures of the database that they are in, such as an index."""

Row = tuple[Any, ...]
"""Sequence, subject, body and hash of a record, of whatever types they were found to be."""

Watch = Callable[[Row], None]
"""Told each row that is good, in order."""


@dataclass(frozen=True, slots=True)
class End:
    """Where a ledger says that it ends."""

    size: int
    head: bytes
    frontier: bytes


@dataclass(frozen=True, slots=True)
class Claims:
    """What a ledger says of itself; ``end`` is None where it keeps nothing but its records."""

    stream: str
    sealed: int
    end: End | None


class Source(Protocol):
    """One ledger, in one state: what is written meanwhile is not seen.

    What cannot be asked at the moment, as when a connection breaks, is a LedgerFileError.
    """

    def claims(self) -> Claims | str:
        """What the ledger says of itself; or what is wrong with that, or with the form of what it is kept in."""
        ...

    def rows(self) -> Iterator[Row]:
        """All of its records, by their numbers, one or few at a time in memory."""
        ...

    def row(self, sequence: int) -> Row | None:
        """One of them."""
        ...

    def damage(self, tick: Callable[[], None]) -> str | None:
        """What the database finds wrong with its own structures; None for nothing. ``tick`` is called now and then."""
        ...
