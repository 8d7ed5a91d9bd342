"""A fresh database for each test that asks for one, on one server for all."""

from support.databases import database, postgres_proxy, postgres_server

__all__ = ["database", "postgres_proxy", "postgres_server"]
