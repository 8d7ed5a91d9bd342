"""Many workers as one: a user's limit, events and revocations hold over all processes that share a store.

Contexts and what they hold stay where they are. What is shared is who is live where, under leases. Every worker asks
the store for a slot before it opens a context for a named user; what the store is, an adapter says (``store.py`` is
the port).
"""

from ucm_middleware.cluster.policy import ClusterPolicy as ClusterPolicy
