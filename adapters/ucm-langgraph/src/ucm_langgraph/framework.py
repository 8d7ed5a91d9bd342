"""Whether LangGraph is there, and new enough. Imported before anything that imports it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

FLOOR: Final = (1, 2, 24)


def require(distribution: str, floor: tuple[int, ...], why: str = "") -> None:
    """Raise ImportError, which says what to do, unless the distribution is installed in this version or a later one."""
    needed = ".".join(map(str, floor))
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = None
    if installed is None or _numbers(installed) < floor:
        found = "is not installed" if installed is None else f"is installed in version {installed}"
        raise ImportError(
            f"ucm-langgraph needs {distribution} {needed} or later{why}, which {found}: "
            f"pip install '{distribution}>={needed}'"
        )


def _numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


require("langgraph", FLOOR)
