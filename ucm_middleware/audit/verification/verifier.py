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
from ucm_middleware.audit.verification.ledger_file import Claims, LedgerFile, Stage, open_ledger, quiet
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
) -> Verification:
    """Verify the ledger in a file, which may be in use: then, what it was at the start.

    Memory is bounded, however many records there are. Nothing is changed; beside a ledger that is in use, SQLite keeps
    its ``-shm`` file. What ``progress`` raises ends it.

    Raises LedgerFileError when the file is not a ledger, or one of a newer format. Whatever is in it otherwise is a
    result.
    """
    tell = progress or _tell_nobody
    state = quiet(path)
    if state is not None:
        with open_ledger(path, untouched=True) as ledger:
            result = _Verifier(ledger, checkpoints, tell).run()
        if state.still():
            return result
    with open_ledger(path, untouched=False) as ledger:  # somebody writes, or began to meanwhile
        return _Verifier(ledger, checkpoints, tell).run()


class _Verifier:
    """One verification of one ledger."""

    __slots__ = ("_checkpoints", "_covered", "_held", "_ledger", "_problems", "_tell")

    def __init__(self, ledger: LedgerFile, checkpoints: Sequence[Checkpoint], tell: Progress) -> None:
        self._ledger = ledger
        self._checkpoints = checkpoints
        self._tell = tell
        self._problems: list[Problem] = []
        self._covered = 0
        self._held = 0

    def run(self) -> Verification:
        """What is found."""
        claims = self._ledger.shape_problem() or self._ledger.claims()
        if isinstance(claims, str):
            return Verification("", None, 0, MerkleTree().root, 0, 0, (Problem(None, claims),))
        chain = Chain(self._ledger.connection, genesis(claims.stream, claims.sealed))
        self._verify_against_checkpoints(chain, claims)
        self._walk(chain, claims, sys.maxsize)
        if chain.fault is not None:
            self._found(chain.count + 1, chain.fault)
        else:
            self._verify_claims(chain, claims)
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
            else:
                whose = f"is of another ledger, {checkpoint.stream}, and this one is {stream}"
                remedy = "one of the two files is not the right one, or the ledger was replaced"
                self._found(None, f"checkpoint {number} {whose}: {remedy}")
        return roots

    def _verify_claims(self, chain: Chain, claims: Claims) -> None:
        """Compare what the ledger says of itself with the records, of which the walk has reached the end."""
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
            self._tell("records", chain.count, max(chain.count, claims.size))
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
