"""One PostgreSQL, for the application that needs one."""

from support.databases import postgres_server

__all__ = ["postgres_server"]
