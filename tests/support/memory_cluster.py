"""The store in memory as an adapter of the scheme ``memory``: each host is a server of its own, shared by a process."""

from collections.abc import Sequence

from support.memory_store import MemoryServer, MemoryStore

SERVERS: dict[str, MemoryServer] = {}
"""By host: a test puts its server here, and takes it out again."""


def open_store(url: str, *, prefix: str, seals: Sequence[str], timeout: float) -> MemoryStore:
    """What the entry point names."""
    return MemoryStore(SERVERS[url.partition("://")[2]], prefix, seals)
