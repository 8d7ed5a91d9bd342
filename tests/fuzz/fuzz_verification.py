"""Lets libFuzzer look for a file that crashes the verifier, or that it accepts though the records are others.

python -m tests.fuzz.fuzz_verification [options of libFuzzer, such as -max_total_time=600] [a folder for the corpus]

What it is given is a patch: small ones of the bytes of a ledger of twelve records, so that most are still a database.
"""

import os
import sqlite3
import sys
import tempfile
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from support.ledgers import facts, write_ledger
from ucm_middleware.errors import LedgerFileError

atheris: Any = import_module("atheris")  # has no types, and is installed only where this runs

with atheris.instrument_imports(include=["ucm_middleware.audit.verification"]):
    from ucm_middleware.audit.verification import Checkpoint, verify_ledger

TWELVE = facts(12)
WHOLE = Checkpoint(TWELVE.stream, 12, TWELVE.root)
SUBJECTS = sorted({subject for subject, _ in TWELVE.entries})
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
ORIGINAL = write_ledger(FOLDER / "ledger.db", TWELVE, page_size=512).read_bytes()
IS_RAW = 0xFF


def patched(data: bytes) -> bytes:
    """Up to eight stretches of the original replaced; with a first byte of 0xFF, the bytes as they are."""
    give = atheris.FuzzedDataProvider(data)
    if give.ConsumeIntInRange(0, IS_RAW) == IS_RAW:
        return bytes(give.ConsumeBytes(len(data)))
    content = bytearray(ORIGINAL)
    for _ in range(give.ConsumeIntInRange(1, 8)):
        at = give.ConsumeIntInRange(0, len(content) - 1)
        piece = give.ConsumeBytes(give.ConsumeIntInRange(1, 32))
        content[at : at + len(piece)] = piece
    return bytes(content)


def check(data: bytes) -> None:
    """One run. Raises when the verifier is wrong."""
    path = FOLDER / "fuzzed.db"
    path.write_bytes(patched(data))
    try:
        found = verify_ledger(path, [WHOLE])
    except LedgerFileError:
        return
    if not found.is_verified:
        return
    rows = TWELVE.rows()
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        if connection.execute("SELECT * FROM records NOT INDEXED ORDER BY sequence").fetchall() != rows:
            raise AssertionError("accepted, though the table reads differently")
        for subject in SUBJECTS:
            query = (
                "SELECT * FROM records INDEXED BY records_by_subject "
                "WHERE sequence >> 10 = 0 AND subject = ? ORDER BY sequence"
            )
            if connection.execute(query, (subject,)).fetchall() != [row for row in rows if row[1] == subject]:
                raise AssertionError("accepted, though a trail reads differently")


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
