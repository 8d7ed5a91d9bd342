"""Where ledgers are: in files, or at a URL, which an adapter knows that is found by the URL's scheme."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final, Protocol, cast

from ucm_middleware.audit.reading import RecordReader
from ucm_middleware.audit.verification import Given, Source
from ucm_middleware.errors import ConfigurationError, LedgerFileError
from ucm_middleware.installed import sole
from ucm_middleware.secret import SecretRing

GROUP: Final = "ucm_middleware.ledgers"
"""Entry points: the scheme of a URL, and a module that is a ``Place``."""

_BROUGHT_BY: Final = {"postgresql": "ucm-postgres[ledger]", "postgres": "ucm-postgres[ledger]"}
_URL: Final = re.compile("([a-z][a-z0-9+.-]*)://")


class Place(Protocol):
    """What knows ledgers at URLs of one scheme. What it says of one has no password in it."""

    def open_sources(self, url: str) -> AbstractContextManager[Sequence[tuple[str, Source]]]:
        """All streams there, each with what a person calls it, for the verifier. Raises LedgerFileError."""
        ...

    def open_reader(self, url: str, keys: Path | None, secrets: SecretRing) -> AbstractContextManager[RecordReader]:
        """What is there, to be read. Raises LedgerFileError."""
        ...

    def erase_user(self, url: str, keys: Path, secrets: SecretRing, user_id: str, reason: str) -> int:
        """As ``ucm_middleware.audit.erasure.erase_user``."""
        ...


def place_of(ledger: str) -> Place | None:
    """What knows the ledgers at a URL; None for the name of a file. Raises ConfigurationError where nothing does."""
    found = _URL.match(ledger)
    if found is None:
        return None
    scheme = found[1]
    entry_point = sole(GROUP, scheme)
    if entry_point is None:
        raise _not_installed(scheme, "is not installed")
    try:
        return cast("Place", entry_point.load())
    except ImportError as error:
        raise _not_installed(scheme, f"cannot be imported ({error})") from None


def open_all(ledgers: Sequence[str], stack: ExitStack) -> list[Given]:
    """Each ledger that was named, and each stream at a URL. What cannot be opened is there with its error."""
    given: list[Given] = []
    for ledger in ledgers:
        place = place_of(ledger)
        if place is None:
            given.append(Given(ledger, Path(ledger)))
            continue
        try:
            streams = stack.enter_context(place.open_sources(ledger))
        except LedgerFileError as error:
            given.append(Given(error.path, error))
        else:
            given += [Given(name, source) for name, source in streams]
    return given


def _not_installed(scheme: str, what: str) -> ConfigurationError:
    package = _BROUGHT_BY.get(scheme)
    if package is None:
        return ConfigurationError(f"ledgers at {scheme}:// are known to nothing that is installed here; name a file")
    return ConfigurationError(f"what reads ledgers at {scheme}:// {what}: pip install '{package}'")
