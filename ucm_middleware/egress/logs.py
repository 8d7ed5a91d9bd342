"""A filter for handlers of the log: records made in a user's context, with another user's protected value in them."""

import logging
from collections.abc import Iterator
from typing import Final, Protocol, cast

from ucm_middleware.current import ambient_context
from ucm_middleware.egress.guard import EgressGuard
from ucm_middleware.egress.tokens import as_bytes

_OWN: Final = "ucm_middleware.egress"
_DEEPEST: Final = 8


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
        extras = {name: b"\n".join(_texts(value, 0)) for name, value in list(record.__dict__.items())}
        hits = guard.hits_here(b"\n".join((_message(record), *extras.values())), "log", record.name)
        if hits:
            guard.report(context.user_id, hits, is_blocked=guard.policy.block)
            if guard.policy.block:
                for name, text in extras.items():
                    if guard.hits_here(text, "log"):
                        record.__dict__[name] = "<held back>"
                record.msg = "<held back: it has a protected value of another user in it>"
                record.args = record.exc_info = record.exc_text = record.stack_info = None
        return True


def _message(record: logging.LogRecord) -> bytes:
    """What a formatter makes of a record, its traceback with it: nothing is left in it, formatters have their own."""
    try:
        text = record.getMessage()
        if record.exc_info and record.exc_text is None:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
    except Exception:  # noqa: BLE001 - handlers fail at it in the same way, and logging complains of it itself
        return b""
    return as_bytes(text)


def _texts(value: object, depth: int) -> Iterator[bytes]:
    """The texts in a record's attribute, which may be plain data."""
    if type(value) is str or type(value) is bytes:
        yield as_bytes(value)
    elif depth < _DEEPEST and type(value) is dict:
        for pair in list(cast("dict[object, object]", value).items()):
            yield from _texts(pair, depth)
    elif depth < _DEEPEST and (type(value) is list or type(value) is tuple):
        for item in list(cast("list[object]", value)):
            yield from _texts(item, depth + 1)
