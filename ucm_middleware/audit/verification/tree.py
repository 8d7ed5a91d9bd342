"""The Merkle tree of RFC 9162, section 2.1, grown from leaf hashes and held in as many hashes as it has levels."""

from hashlib import sha256
from typing import Final

_NODE: Final = b"\x01"


class MerkleTree:
    """A tree that only grows."""

    __slots__ = ("_unpaired",)

    def __init__(self) -> None:
        self._unpaired: list[bytes | None] = []  # of each level, from the leaves up, the node that has no sibling yet

    def extend(self, leaves: list[bytes]) -> None:
        """Add leaf hashes on the right. Takes the list as its own."""
        nodes, level, unpaired = leaves, 0, self._unpaired
        while nodes:
            if level == len(unpaired):
                unpaired.append(None)
            if (waiting := unpaired[level]) is not None:
                nodes.insert(0, waiting)
            unpaired[level] = nodes.pop() if len(nodes) % 2 else None
            pairs = iter(nodes)
            nodes = [sha256(_NODE + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]
            level += 1

    @property
    def frontier(self) -> bytes:
        """The roots of the full subtrees, 32 bytes each, the largest first."""
        return b"".join(node for node in reversed(self._unpaired) if node is not None)

    @property
    def root(self) -> bytes:
        """The root over all leaves, 32 bytes; of no leaves, the hash of nothing."""
        root: bytes | None = None
        for node in self._unpaired:
            if node is not None:
                root = node if root is None else sha256(_NODE + node + root).digest()
        return sha256().digest() if root is None else root
