"""The store of a cluster on Valkey or Redis: entry points of the group ``ucm_middleware.cluster``."""

from ucm_valkey.cluster.store import open_store as open_store
