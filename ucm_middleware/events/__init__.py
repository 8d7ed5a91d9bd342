"""Events to users: to each live connection of theirs, in order, and kept for a while for those that come back."""

from ucm_middleware.events.delivery import Delivery, Dropped
from ucm_middleware.events.policy import EventPolicy

__all__ = ["Delivery", "Dropped", "EventPolicy"]
