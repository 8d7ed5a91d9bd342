"""Verifies several ledgers, each by itself and then all together: whether they are what one application has written."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm_middleware.audit.verification.evidence import Checkpoint
from ucm_middleware.audit.verification.overlap import Meeting, Overlap
from ucm_middleware.audit.verification.source import Source, Watch
from ucm_middleware.audit.verification.verifier import Progress, Verification, verify_ledger, verify_source
from ucm_middleware.errors import LedgerFileError

_SHOWN: Final = 10
"""How many of the ledgers that have something in common are named."""


@dataclass(frozen=True, slots=True)
class Given:
    """A ledger as it was handed in: what a person calls it, and what it is, if that could be opened."""

    name: str
    ledger: Path | Source | LedgerFileError

    def verify(
        self, checkpoints: Sequence[Checkpoint], progress: Progress | None, watching: Callable[[], Watch]
    ) -> Verification:
        """As ``verify_ledger``."""
        if isinstance(self.ledger, LedgerFileError):
            raise self.ledger
        if isinstance(self.ledger, Path):
            return verify_ledger(self.ledger, checkpoints, progress, watching, of_several=True)
        return verify_source(self.ledger, checkpoints, progress, watching, of_several=True)


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of one of several ledgers. ``times`` are those of its earliest and latest record, in seconds since
    1970.
    """

    name: str
    found: Verification | LedgerFileError
    times: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Together:
    """What was found: of each ledger by itself, and what is wrong with them together, each in words."""

    ledgers: tuple[Examined, ...]
    problems: tuple[str, ...]

    @property
    def verified(self) -> tuple[Verification, ...]:
        """Those with which nothing is wrong."""
        return tuple(found for found in self._read() if found.is_verified)

    @property
    def has_problems(self) -> bool:
        """Whether something is wrong, with one or with all together."""
        return bool(self.problems) or any(not found.is_verified for found in self._read())

    @property
    def is_complete(self) -> bool:
        """Whether each could be verified."""
        return all(isinstance(each.found, Verification) for each in self.ledgers)

    @property
    def is_verified(self) -> bool:
        """Whether each could be verified, and nothing is wrong."""
        return self.is_complete and not self.has_problems

    def _read(self) -> Iterator[Verification]:
        return (each.found for each in self.ledgers if isinstance(each.found, Verification))


def verify_together(
    ledgers: Sequence[Given],
    checkpoints: Sequence[Checkpoint] = (),
    expected: int | None = None,
    progress: Progress | None = None,
) -> Together:
    """Verify ledgers of one application, each of which has a stream of its own.

    ``checkpoints`` may be of all of them; a stream that has some must be there. ``expected`` is how many streams there
    must be. What is compared is in a temporary file, so that memory is bounded.
    """
    with closing(Overlap()) as overlap:
        examined = [_examined(number, each, checkpoints, progress, overlap) for number, each in enumerate(ledgers)]
        problems = [*_of_streams(examined, overlap), *_missing(examined, checkpoints, expected)]
        records, contexts = overlap.in_several()
    problems += [_of_records(meeting, examined) for meeting in records]
    problems += [_of_contexts(meeting, examined) for meeting in contexts]
    return Together(tuple(examined), tuple(problems))


def _examined(
    number: int, given: Given, checkpoints: Sequence[Checkpoint], progress: Progress | None, overlap: Overlap
) -> Examined:
    try:
        found = given.verify(checkpoints, progress, overlap.watching(number))
    except LedgerFileError as error:
        overlap.forget(number)
        return Examined(given.name, error, None)
    return Examined(given.name, found, overlap.times(number))


def _streams(examined: Iterable[Examined]) -> dict[str, list[int]]:
    """Which ledgers say that they are which stream."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(examined):
        if isinstance(each.found, Verification) and each.found.stream:
            numbers[each.found.stream].append(number)
    return numbers


def _of_streams(examined: Sequence[Examined], overlap: Overlap) -> Iterator[str]:
    """What several ledgers are that have the name of one. Only the first of them is compared with others afterwards."""
    for stream, (first, *others) in _streams(examined).items():
        for other in others:
            yield f"{examined[first].name} and {examined[other].name} are both {stream}: " + _fork(
                examined[first], examined[other], overlap.common_start(first, other)
            )
            overlap.forget(other)


def _fork(one: Examined, other: Examined, common: int) -> str:
    assert isinstance(one.found, Verification)
    assert isinstance(other.found, Verification)
    sizes = one.found.records, other.found.records
    if sizes == (common, common):
        return f"the same {common} records, so that one is a copy, or was handed in twice"
    if common in sizes:
        shorter, longer = (one, other) if common == sizes[0] else (other, one)
        return (
            f"{shorter.name} has the first {common} records of {longer.name} and no more, so that it is an older copy, "
            "or was cut off"
        )
    return f"a fork, for they have the first {common} records in common and differ from record {common + 1} on"


def _missing(examined: Sequence[Examined], checkpoints: Sequence[Checkpoint], expected: int | None) -> Iterator[str]:
    found = _streams(examined)
    signed: dict[str, int] = {}
    for checkpoint in checkpoints:
        signed[checkpoint.stream] = max(checkpoint.size, signed.get(checkpoint.stream, 0))
    for stream, size in signed.items():
        if stream not in found:
            yield f"{stream} is missing: there is a checkpoint over {size} records, and no ledger here is that stream"
    if expected is not None and len(found) != expected:
        yield f"{expected} streams are expected, and {len(found)} are here"


def _listed(places: Sequence[str]) -> str:
    more = len(places) - _SHOWN
    return " and ".join(places if more <= 0 else (*places[:_SHOWN], f"{more} more"))


def _of_records(meeting: Meeting, examined: Sequence[Examined]) -> str:
    where = _listed([f"record {sequence} of {examined[number].name}" for number, sequence, _ in meeting.places])
    if meeting.number == 1:
        return f"a record is in several ledgers: {where}"
    return f"{meeting.number} records are in several ledgers, the first as {where}"


def _of_contexts(meeting: Meeting, examined: Sequence[Examined]) -> str:
    where = _listed(
        [
            f"{'closed' if event == 'closed' else 'opened'} in {examined[number].name} (record {sequence})"
            for number, sequence, event in meeting.places
        ]
    )
    rule = "a context lives in one process, and is on record in its ledger alone"
    if meeting.number == 1:
        return f"a context was {where}: {rule}"
    return f"{meeting.number} contexts are in several ledgers, the first {where}: {rule}"
