"""Each framework serves on a real server."""

from support.fixtures import module_server_factory

__all__ = ["module_server_factory"]
