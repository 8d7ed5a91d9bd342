"""What can go wrong between a cache and its server, in words that carry no value, key, user or password."""

from typing import Final, Literal

from ucm_middleware import UserContextError

Reason = Literal["down", "timeout", "login", "refused", "read-only", "memory", "loading", "out of step", "error"]

_REMEDIES: Final[dict[Reason, str]] = {
    "down": "the server cannot be reached, or the pool has no connection to spare: see that it runs, where the pool's "
    "URL points, and whether max_connections is enough",
    "timeout": "the server did not answer in time: see its load and the pool's socket_timeout; what was asked may have "
    "been done",
    "login": "the server takes neither the name nor the password: see the pool's username and password, and in the "
    "mode of server users whether the admin pool reaches the same server",
    "refused": "the server's login may not do this: see what the README says the login needs",
    "read-only": "the server is a replica and takes no writes: point the pool at the primary",
    "memory": "the server is at its maxmemory and evicts nothing: raise the limit or set an eviction policy such as "
    "allkeys-lru",
    "loading": "the server is still reading its data: ask again later",
    "out of step": "a reply came that was another command's: the connection was thrown away; give the adapter a pool "
    "of its own that nothing else uses",
    "error": "the server answered with an error: see its version and its log",
}


class CacheUnavailableError(UserContextError):
    """The cache did not do what it was asked; ``reason`` says why in a word, ``code`` is the server's own word for it.

    Nothing else of the server's message is kept: it can repeat keys and values.
    """

    def __init__(self, reason: Reason, code: str = "") -> None:
        super().__init__(f"the cache is unavailable ({reason}{', ' + code if code else ''}): {_REMEDIES[reason]}")
        self.reason = reason
        self.code = code
