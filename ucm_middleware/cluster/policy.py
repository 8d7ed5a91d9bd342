"""How workers share their users: over which store, and what happens while it cannot be asked."""

import re
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from ucm_middleware.errors import ConfigurationError

CLUSTER_VARIABLE: Final = "UCM_CLUSTER_URL"
"""The setting that alone makes workers share their users."""

WhenUnavailable = Literal["closed", "local"]

MOST_NAME: Final = 32
"""Characters of an application's name."""

LEAST_LEASE: Final = 1.0
LONGEST_LEASE: Final = 1200.0
"""Seconds. Of a user whose worker is cut off, the store must not forget the leases before they are over."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPolicy:
    """``url`` is where the store is, ``UCM_CLUSTER_URL`` by default; its scheme says which adapter serves it.
    ``application`` is what the keys of this application begin with: letters, digits, ``-`` and ``_``.

    While the store cannot be asked, "closed" refuses new contexts with 503, and live ones end with their lease. "local"
    carries on with the limits of each worker alone, and comes back to those of all once the store does.

    ``lease`` is for how many seconds a worker holds its slots without word of it: so long they stay taken after it was
    killed, and so long nothing is granted by a store that is new or has failed over. ``timeout`` is how many seconds
    the store has for an answer.

    Raises ConfigurationError for what breaks a rule.
    """

    url: str | None = field(default=None, repr=False)  # it may have a password in it
    application: str = "ucm"
    when_unavailable: WhenUnavailable = "closed"
    lease: float = 15.0
    timeout: float = 1.0

    def __post_init__(self) -> None:
        if self.url is not None:
            check_url(self.url)
        _check_name(self.application)
        if self.when_unavailable not in get_args(WhenUnavailable):
            raise ConfigurationError(
                f"cluster: when_unavailable must be 'closed' or 'local', not {self.when_unavailable!r}"
            )
        _check_seconds("lease", self.lease, LEAST_LEASE, LONGEST_LEASE)
        _check_seconds("timeout", self.timeout, 0.01, self.lease / 3)


def check_url(url: object) -> None:
    """Raise ConfigurationError for what is no URL, without showing it."""
    if not isinstance(url, str) or _SCHEME.match(url) is None:
        raise ConfigurationError(
            "cluster: url must be text such as 'valkey://host:6379/0'; what was given is not shown, since it may "
            "have a password in it"
        )


def _check_name(name: object) -> None:
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MOST_NAME
        or not name.isascii()
        or not name.replace("-", "").replace("_", "").isalnum()
    ):
        raise ConfigurationError(
            f"cluster: application must be 1 to {MOST_NAME} letters, digits, '-' and '_', not {name!r}"
        )


def _check_seconds(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigurationError(
            f"cluster: {name} must be a number of seconds from {least:g} to {most:g}, not {value!r}"
            + ("; the store must answer within a third of the lease" if name == "timeout" else "")
        )
