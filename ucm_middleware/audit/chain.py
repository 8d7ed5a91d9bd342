"""The hash chain of a ledger, and the frontier of the Merkle tree over it, as they grow."""

from hashlib import sha256
from typing import Final

HASH_LENGTH: Final = 32

LEAF: Final = b"\x00"
NODE: Final = b"\x01"
"""What goes in front of a record, and of two joined hashes (RFC 9162, section 2.1.1)."""


def genesis(stream: str, *, sealed: bool) -> bytes:
    """What the first record is chained to."""
    return sha256(f"ucm-middleware ledger 1\n{stream}\n{'sealed' if sealed else 'plain'}".encode()).digest()


class Chain:
    """How many records there are, the hash of the last one, and the roots of the full subtrees, the largest first."""

    __slots__ = ("frontier", "head", "size")

    def __init__(self, size: int, head: bytes, frontier: bytes) -> None:
        self.size = size
        self.head = head
        self.frontier = [frontier[at : at + HASH_LENGTH] for at in range(0, len(frontier), HASH_LENGTH)]

    def copy(self) -> "Chain":
        """Another one that goes on from here."""
        return Chain(self.size, self.head, self.packed_frontier())

    def append(self, subject: bytes, body: bytes) -> bytes:
        """Chain one more record. Returns its hash."""
        self.head = node = digest = link(self.head, subject, body)
        size, frontier = self.size, self.frontier
        while size & 1:
            node = sha256(NODE + frontier.pop() + node).digest()
            size >>= 1
        frontier.append(node)
        self.size += 1
        return digest

    def packed_frontier(self) -> bytes:
        """The roots as they stand in the file."""
        return b"".join(self.frontier)


def link(previous: bytes, subject: bytes, body: bytes) -> bytes:
    """The hash of a record that follows the one with the hash ``previous``."""
    return sha256(LEAF + previous + subject + body).digest()
