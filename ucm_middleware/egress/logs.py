"""A filter for handlers of the log: records made in a user's context, with another user's protected value in them."""

import logging
from typing import Final, Protocol

from ucm_middleware.current import ambient_context
from ucm_middleware.egress.guard import EgressGuard

_OWN: Final = "ucm_middleware.egress"


class Guarded(Protocol):
    """What is needed of a manager."""

    @property
    def egress(self) -> EgressGuard | None: ...


class EgressFilter(logging.Filter):
    """Looks at each record that is made in a user's context, with its traceback and its extra texts. What is found is
    put on record; where the policy blocks, the record says instead that it was held back.

    Put it on a handler: filters of loggers do not see the records of their children. A record made outside of any
    context has no receiver, and passes as it is.
    """

    def __init__(self, manager: Guarded) -> None:
        super().__init__()
        self._manager = manager

    def filter(self, record: logging.LogRecord) -> bool:
        guard = self._manager.egress
        context = ambient_context()
        if guard is None or context is None or record.name.startswith(_OWN):
            return True
        if record.exc_info and record.exc_text is None:
            record.exc_text = logging.Formatter().formatException(record.exc_info)  # formatters take it from there
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            message = f"{record.msg} {record.args}"  # logging complains of it itself
        extras = [value for value in list(record.__dict__.values()) if type(value) is str]
        hits = guard.hits_here("\n".join((message, *extras)), "log", record.name)
        if hits:
            guard.report(context.user_id, hits, is_blocked=guard.policy.block)
            if guard.policy.block:
                for name, value in list(record.__dict__.items()):
                    if type(value) is str and guard.hits_here(value, "log"):
                        record.__dict__[name] = "<held back>"
                record.msg = "<held back: it has a protected value of another user in it>"
                record.args = record.exc_info = record.exc_text = record.stack_info = None
        return True
