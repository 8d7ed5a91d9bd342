"""The doctor: what a database does not keep apart. Needs psycopg, of the extra ``doctor``."""

from ucm_postgres.doctor.examine import examine, require_healthy
from ucm_postgres.doctor.findings import Finding, Severity
from ucm_postgres.doctor.pools import examine_async_pool, examine_pool

__all__ = ["Finding", "Severity", "examine", "examine_async_pool", "examine_pool", "require_healthy"]
