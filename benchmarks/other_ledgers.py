"""Other packages that keep hash-chained records, each used so that a record is on the disk when its call returns."""

import asyncio
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ucm_middleware.audit.records import Row


class AuditChain:
    """auditchain on SQLite, whose commits are durable by SQLite's defaults, one for each record.

    Of tasks that append at once all but one fail, since they take the same sequence number, also with its own lock; so
    there is one around it.
    """

    def __init__(self, folder: Path) -> None:
        package = import_module("auditchain")
        backend = import_module("auditchain.backends.sqlite").SqliteBackend(folder / "auditchain")
        self._log = package.AuditLog(backend)
        self._lock = asyncio.Lock()

    async def write(self, row: Row) -> None:
        async with self._lock:
            await self._log.append(row[2], row[0], f"context_{row[4]:032x}", metadata=_metadata(row))

    def finish(self) -> None: ...

    def close(self, written: Sequence[Row]) -> None:
        asyncio.run(self._log.close())


class RustPyAudit:
    """rust-py-audit with its fsync for each record, called in threads, since it blocks."""

    def __init__(self, folder: Path) -> None:
        package = import_module("rust_py_audit")
        self._logger = package.AuditLogger("benchmarks", file_path=str(folder / "rust-py-audit"), fsync=True)

    async def write(self, row: Row) -> None:
        context_id = f"context_{row[4]:032x}"
        await asyncio.to_thread(self._logger.log, row[2], row[0], "context", context_id, metadata=_metadata(row))

    def finish(self) -> None: ...

    def close(self, written: Sequence[Row]) -> None: ...


def _metadata(row: Row) -> dict[str, object]:
    """What a record has and those ledgers have no field for."""
    return {
        "id": f"{row[12]:032x}",
        "outcome": row[8],
        "trace": f"{row[13]:032x}",
        "span": f"{row[14]:016x}",
        **dict(row[11]),
    }
