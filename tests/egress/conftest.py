"""The guard is proved on real servers."""

from support.fixtures import module_server_factory, server_factory, server_kind

__all__ = ["module_server_factory", "server_factory", "server_kind"]
