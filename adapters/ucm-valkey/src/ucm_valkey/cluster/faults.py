"""What can go wrong between a worker and its store, in words that carry no key, value, user or password.

Of a server's message nothing is kept but its code, and whether it was about a command, a key or a channel.
"""

from dataclasses import dataclass
from typing import Final

from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError
from ucm_valkey.library import BY_CODE

_REASONS: Final[dict[str, str]] = {
    **BY_CODE,
    "BUSY": "loading",
    "TRYAGAIN": "loading",
    "NOREPLICAS": "read-only",
    "MISCONF": "read-only",
    "ACL": "refused",
}
"""A word of the core's for each code of a server's; for others it is "down"."""

_RIGHTS: Final = "the login may not do this; the README of ucm-valkey has the rights that it needs"
_REMEDIES: Final = {
    "NOPERM": _RIGHTS,
    "ACL": _RIGHTS,  # so a script is refused that has begun
    "NOAUTH": "the server wants a password, and the url has none",
    "WRONGPASS": "the server takes neither the url's user nor its password",
    "OOM": "the server has no memory left: raise its maxmemory",
    "READONLY": "the server is a replica: the url must name the primary",
    "NOREPLICAS": "the server has fewer replicas than it must write to",
    "MISCONF": "the server takes no writes, since it cannot save them: see its log",
    "TRYAGAIN": "keys are on their way to another node of the cluster",
    "CLUSTERDOWN": "no node of the cluster serves a part of the keys",
}


class StoreError(ClusterUnavailableError):
    """``is_lasting`` is whether trying again cannot help, as long as nobody changes a setting."""

    def __init__(self, reason: str, detail: str, *, is_unknown: bool = False, is_lasting: bool = False) -> None:
        super().__init__(reason, is_unknown=is_unknown, detail=detail)
        self.is_lasting = is_lasting

    def at_start(self) -> ClusterUnavailableError | ConfigurationError:
        """What to raise instead before anything was served."""
        return ConfigurationError(f"cluster: {self.detail}") if self.is_lasting else self


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that a server answered one command with. ``about`` is "key", "channel" or ""; ``slot`` and
    ``node`` are those of a redirection.
    """

    code: str
    about: str = ""
    slot: int = -1
    node: tuple[str, int] | None = None

    def error(self, *, is_unknown: bool = False) -> StoreError:
        """What to raise for it."""
        detail = _REMEDIES.get(self.code, "see the server's log")
        return StoreError(_REASONS.get(self.code, "down"), f"{self.code}, {detail}", is_unknown=is_unknown)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer."""

    reason: str
    detail: str
    is_lasting: bool = False

    def error(self, *, is_unknown: bool) -> StoreError:
        """What to raise for it, to one that waited."""
        return StoreError(self.reason, self.detail, is_unknown=is_unknown, is_lasting=self.is_lasting)
