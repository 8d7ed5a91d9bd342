"""What outlives a request is proved on real servers."""

from support.fixtures import module_server_factory, server_factory

__all__ = ["module_server_factory", "server_factory"]
