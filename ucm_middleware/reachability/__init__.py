"""The reachability check: the mutable objects to which the data of two owners lead.

It runs none of the application's code: no ``__eq__``, ``__hash__``, ``__repr__``, ``__getattr__``, property or
overridden iteration. Objects are told apart by identity, and what they hold is asked of the garbage collector.
"""

from ucm_middleware.reachability.check import Check, Source, find_shared
from ucm_middleware.reachability.kinds import Boundary
from ucm_middleware.reachability.policy import IsolationPolicy
from ucm_middleware.reachability.report import Finding, IsolationReport, Root, Unseen

__all__ = [
    "Boundary",
    "Check",
    "Finding",
    "IsolationPolicy",
    "IsolationReport",
    "Root",
    "Source",
    "Unseen",
    "find_shared",
]
