"""A store from its URL."""

from collections.abc import Sequence

from ucm_middleware.cluster.store import BUCKETS, Session, Store
from ucm_valkey.cluster.clients import Client
from ucm_valkey.cluster.keys import Keys
from ucm_valkey.cluster.session import ValkeySession
from ucm_valkey.cluster.urls import target_of


class ValkeyStore:
    """Makes sessions, in any thread."""

    def __init__(self, client: Client, keys: Keys, seals: Sequence[str]) -> None:
        self._client = client
        self._keys = keys
        self._seals = tuple(seals)

    def session(self) -> Session:
        """A session for the running loop."""
        return ValkeySession(self._client, self._keys, self._seals)


def open_store(url: str, *, prefix: str, seals: Sequence[str], timeout: float) -> Store:
    """A store on a server, or a cluster, of Valkey or Redis. Connects to nothing yet.

    Raises ConfigurationError for a URL that cannot be taken, without showing it.
    """
    return ValkeyStore(Client(target_of(url), timeout), Keys(prefix, BUCKETS), seals)
