"""Files as they are given by a person: what is not one, or too large to be one, is said in words."""

import os
import stat
from pathlib import Path

from ucm_middleware.errors import LedgerFileError


def check_regular_file(path: Path, remedy: str) -> os.stat_result:
    """Its status. Raises LedgerFileError for a directory, a device, and what does not exist or cannot be read."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            return status
    except FileNotFoundError:
        raise LedgerFileError(str(path), "does not exist", remedy) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LedgerFileError(str(path), f"cannot be read: {error}", remedy) from None
    if stat.S_ISDIR(status.st_mode):
        raise LedgerFileError(str(path), "is a directory", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise LedgerFileError(str(path), "is not a regular file", remedy)
    raise LedgerFileError(str(path), "may not be read by this user", "run as one who may")


def read_start(path: Path, length: int, remedy: str) -> bytes:
    """Its first bytes. Raises LedgerFileError where they cannot be had."""
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise LedgerFileError(str(path), f"cannot be read: {error}", remedy) from None


def read_small_file(path: Path, limit: int, remedy: str) -> bytes:
    """Its content. Raises LedgerFileError where it cannot be had, or is longer than ``limit`` bytes."""
    check_regular_file(path, remedy)
    content = read_start(path, limit + 1, remedy)
    if len(content) > limit:
        raise LedgerFileError(str(path), f"has more than {limit:,} bytes", remedy)
    return content
