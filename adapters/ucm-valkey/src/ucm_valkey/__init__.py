"""Caches on Valkey and Redis that belong to one user: an adapter of ucm-middleware."""

from ucm_valkey.cache import SyncUserCache, UserCache
from ucm_valkey.errors import CacheUnavailableError
from ucm_valkey.plugin import SyncValkeyCache, ValkeyCache

__all__ = ["CacheUnavailableError", "SyncUserCache", "SyncValkeyCache", "UserCache", "ValkeyCache"]
