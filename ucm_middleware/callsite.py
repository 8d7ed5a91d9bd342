"""Where the package was called from, for the errors that name it."""

import inspect
from typing import Final

_PASSED_OVER: Final = frozenset({__name__.partition(".")[0], "contextlib"})
"""The package, and what stands between its own ``@asynccontextmanager`` and who enters that."""

CallSite = str | tuple[str, int]
"""A description, or a file and a line, which are joined only where somebody reads them."""


def caller() -> CallSite:
    """The file and line that the package was called from."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame = frame.f_back
    return ("?", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def as_text(site: CallSite) -> str:
    """A call site as it stands in an error."""
    return site if isinstance(site, str) else f"{site[0]}:{site[1]}"
