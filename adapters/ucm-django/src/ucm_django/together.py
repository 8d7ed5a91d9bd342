"""A binding and its statement, sent together: one round trip, and one transaction without BEGIN and COMMIT.

It is psycopg's pipeline with an end of its own. psycopg sends a Flush behind the Sync. For one that reaches PgBouncer
outside of a transaction it takes a server connection, which it then does not give back.
"""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGresult


@contextmanager
def together(connection: Any) -> Generator[None]:
    """Around what is executed on psycopg's connection. Raises the psycopg.Error of what fails, the commit included."""
    with connection.pipeline() as pipeline:
        pipeline.__class__ = _Pipeline  # psycopg has no place to name another
        yield


class _Pipeline(psycopg.Pipeline):
    def _exit_gen(self) -> PQGen[None]:
        try:
            yield from self._sync_gen()
        except psycopg.Error:
            if self.pgconn.status == ConnStatus.OK:
                with suppress(psycopg.Error):  # what comes behind the error was not run
                    yield from self._fetch_gen(flush=False)
            raise

    def _process_results(self, queued: Any, results: list[PGresult]) -> None:
        # A Sync commits. Where that fails, as by a deferred constraint, the error comes ahead of the Sync's own answer,
        # and psycopg expects one of the two. The Sync is the last in the line.
        if queued is None and not self.result_queue and results[0].status == ExecStatus.FATAL_ERROR:
            self.result_queue.append(None)
        super()._process_results(queued, results)
