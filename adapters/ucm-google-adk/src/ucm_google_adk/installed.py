"""Whether the ADK that is installed is one that the adapter was written for."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

NEEDED: Final = (2, 13)
_COMMAND: Final = "pip install 'google-adk>=2.13'"


def require_adk() -> None:
    """Raise ImportError, which names both versions and the command, when google-adk is absent or older."""
    try:
        found = version("google-adk")
    except PackageNotFoundError:
        raise ImportError(
            f"ucm-google-adk needs google-adk {_text(NEEDED)} or later, and none is installed: {_COMMAND}"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < NEEDED:
        raise ImportError(f"ucm-google-adk needs google-adk {_text(NEEDED)} or later, and found {found}: {_COMMAND}")


def unknown_adk(what: str) -> ImportError:
    """To be raised for an ADK whose inside is another than the adapter stands on."""
    return ImportError(
        f"google-adk {version('google-adk')} {what} in a way that this ucm-google-adk does not know; "
        "install a later ucm-google-adk, or pip install 'google-adk==2.13.*'"
    )


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
