"""Verifies a ledger from its first record to its last, against itself and against checkpoints."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm_middleware.audit.verification.chain import Chain, genesis
from ucm_middleware.audit.verification.evidence import Checkpoint
from ucm_middleware.audit.verification.ledger_file import open_ledger, quiet
from ucm_middleware.audit.verification.source import Claims, End, Source, Stage, Watch
from ucm_middleware.audit.verification.tree import MerkleTree

Progress = Callable[[Stage, int, int], None]
"""Told the stage, how many records are done, and of how many."""

_IN_THE_INDEX: Final = re.compile(r"row (\d+) missing from index")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, for a person. ``record`` is the first record that it concerns; None when that is not a record."""

    record: int | None
    message: str

    def __str__(self) -> str:
        return self.message if self.record is None else f"record {self.record}: {self.message}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. ``records`` are good, counted from the first, and ``root`` is their Merkle root, 32 bytes.

    ``covered`` of them stand as a checkpoint says; whether records after those are the ones that were written, and
    whether there were more, nothing here can tell. ``checkpoints`` is how many hold. ``stream`` is empty, and
    ``sealed`` None, where the ledger itself cannot be read.
    """

    stream: str
    sealed: bool | None
    records: int
    root: bytes
    covered: int
    checkpoints: int
    problems: tuple[Problem, ...]

    @property
    def is_verified(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_ledger(
    path: Path,
    checkpoints: Sequence[Checkpoint] = (),
    progress: Progress | None = None,
    watching: Callable[[], Watch] | None = None,
    *,
    of_several: bool = False,
) -> Verification:
    """Verify the ledger in a file, which may be in use: then, what it was at the start.

    Memory is bounded, however many records there are. Nothing is changed; beside a ledger that is in use, SQLite keeps
    its ``-shm`` file. What ``progress`` raises ends it. ``watching`` gives what is told each good record; when it is
    called a second time, all is told from the beginning. With ``of_several``, checkpoints of other streams are of other
    ledgers, and nothing is wrong with that.

    Raises LedgerFileError when the file is not a ledger, or one of a newer format. Whatever is in it otherwise is a
    result.
    """
    state = quiet(path)
    if state is not None:
        with open_ledger(path, untouched=True) as ledger:
            result = verify_source(ledger, checkpoints, progress, watching, of_several=of_several)
        if state.still():
            return result
    with open_ledger(path, untouched=False) as ledger:  # somebody writes, or began to meanwhile
        return verify_source(ledger, checkpoints, progress, watching, of_several=of_several)


def verify_source(
    source: Source,
    checkpoints: Sequence[Checkpoint] = (),
    progress: Progress | None = None,
    watching: Callable[[], Watch] | None = None,
    *,
    of_several: bool = False,
) -> Verification:
    """The same for a ledger that is open, wherever it is kept. Raises LedgerFileError where it cannot be read."""
    watch = None if watching is None else watching()
    return _Verifier(source, checkpoints, progress or _tell_nobody, watch, of_several=of_several).run()


class _Verifier:
    """One verification of one ledger."""

    __slots__ = ("_checkpoints", "_covered", "_held", "_ledger", "_of_several", "_problems", "_tell", "_watch")

    def __init__(
        self,
        ledger: Source,
        checkpoints: Sequence[Checkpoint],
        tell: Progress,
        watch: Watch | None,
        *,
        of_several: bool,
    ) -> None:
        self._ledger = ledger
        self._of_several = of_several
        self._checkpoints = checkpoints
        self._tell = tell
        self._watch = watch
        self._problems: list[Problem] = []
        self._covered = 0
        self._held = 0

    def run(self) -> Verification:
        """What is found."""
        claims = self._ledger.claims()
        if isinstance(claims, str):
            return Verification("", None, 0, MerkleTree().root, 0, 0, (Problem(None, claims),))
        chain = Chain(self._ledger, genesis(claims.stream, claims.sealed), self._watch)
        self._verify_against_checkpoints(chain, claims)
        self._walk(chain, claims, sys.maxsize)
        if chain.fault is not None:
            self._found(chain.count + 1, chain.fault)
        elif claims.end is not None:
            self._verify_end(chain, claims.end)
        self._verify_database(chain)
        return Verification(
            claims.stream,
            bool(claims.sealed),
            chain.count,
            chain.tree.root,
            self._covered,
            self._held,
            tuple(self._problems),
        )

    def _verify_against_checkpoints(self, chain: Chain, claims: Claims) -> None:
        """Walk to where each checkpoint was made, up to the first that does not hold, and compare the roots there."""
        roots_by_size = self._roots_by_size(claims.stream)
        for size in sorted(roots_by_size):
            roots = roots_by_size[size]
            if not self._walk(chain, claims, size):
                if chain.fault is None:
                    self._found(chain.count + 1, f"it is missing: there is a checkpoint over {size} records")
                return
            if (difference := _difference(roots, chain.tree.root)) is not None:
                first = self._covered + 1
                where = f"one of the records {first} to {size}" if size else "the beginning"
                self._found(first, f"{where} is not what it was: {difference} over {size} records")
                return
            self._covered = size
            self._held += len(roots)

    def _roots_by_size(self, stream: str) -> dict[int, list[bytes]]:
        roots: defaultdict[int, list[bytes]] = defaultdict(list)
        for number, checkpoint in enumerate(self._checkpoints, 1):
            if checkpoint.stream == stream:
                roots[checkpoint.size].append(checkpoint.root)
            elif not self._of_several:
                whose = f"is of another ledger, {checkpoint.stream}, and this one is {stream}"
                remedy = "a file has the checkpoints of one ledger; it is not this one's, or the ledger was replaced"
                self._found(None, f"checkpoint {number} {whose}: {remedy}")
        return roots

    def _verify_end(self, chain: Chain, claims: End) -> None:
        """Compare what the ledger says of its end with the records, of which the walk has reached the end."""
        if chain.count < claims.size:
            self._found(chain.count + 1, f"it is missing: the ledger says that it has {claims.size} records")
        elif chain.count > claims.size:
            self._found(claims.size + 1, f"it is one too many: the ledger says that it has {claims.size} records")
        elif chain.head != claims.head:
            last = chain.count or None
            self._found(last, "the ledger's head is not the hash of its last record: one of the two was replaced")
        elif chain.tree.frontier != claims.frontier:
            self._found(None, "the ledger's frontier is not that of its records' Merkle tree")

    def _verify_database(self, chain: Chain) -> None:
        """Let SQLite look for damage of its own, above all for records that the index by subject hides."""
        damage = self._ledger.damage(lambda: self._tell("database", chain.count, chain.count))
        if damage is None:
            return
        hidden = _IN_THE_INDEX.search(damage)
        if hidden and chain.fault is None:  # SQLite counts rows, which by now are known to be numbered likewise
            problem = "the index by subject lacks it or has it wrong: its subject's trail would not show it"
            self._found(int(hidden[1]), problem)
        else:
            self._found(None, f"the database is damaged: {damage}")

    def _walk(self, chain: Chain, claims: Claims, limit: int) -> bool:
        """Whether there are so many records, and good ones."""
        while chain.count < limit:
            goes_on = chain.fault is None and chain.walk(limit)
            total = chain.count if claims.end is None else max(chain.count, claims.end.size)
            self._tell("records", chain.count, total)
            if not goes_on:
                return False
        return True

    def _found(self, record: int | None, message: str) -> None:
        self._problems.append(Problem(record, message))


def _tell_nobody(stage: Stage, done: int, total: int) -> None:
    pass


def _difference(claimed: Sequence[bytes], root: bytes) -> str | None:
    """How what was signed differs from the root of a tree, None when it does not."""
    if len(set(claimed)) > 1:
        return "the ledger was forked, for there are two checkpoints that differ"
    return None if claimed[0] == root else "the ledger differs from the checkpoint"
