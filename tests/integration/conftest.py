"""What is claimed of a running application is shown on a real server."""

from support.fixtures import module_server_factory, server_factory

__all__ = ["module_server_factory", "server_factory"]
