"""The doctor: what a database does not keep apart. Needs psycopg, of the extra ``doctor``."""

from ucm_postgres.doctor.examine import examine, require_healthy
from ucm_postgres.doctor.findings import Finding, Severity

__all__ = ["Finding", "Severity", "examine", "require_healthy"]
