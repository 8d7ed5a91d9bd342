"""A real Valkey, empty for each test that asks for it, and both clients."""

from support.valkey import library, valkey_process, valkey_proxy, valkey_server

__all__ = ["library", "valkey_process", "valkey_proxy", "valkey_server"]
