"""The ids of the running context in log records: a filter for logging, and a processor for structlog."""

import logging
from collections.abc import MutableMapping
from typing import Any

from ucm_middleware.current import ambient_context


class UserContextFilter(logging.Filter):
    """Sets ``user_id``, ``request_id``, ``thread_id`` and ``run_id`` on each record; "-" outside of a context.

    Put it on a handler: filters of loggers do not see the records of their children.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        context = ambient_context()
        record.user_id = "-" if context is None else context.user_id
        record.request_id = "-" if context is None else context.request_id
        record.thread_id = "-" if context is None else context.thread_id
        record.run_id = "-" if context is None else context.run_id
        return True


def add_user_context(logger: Any, method_name: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor that adds the same four; nothing outside of a context. What the caller bound stays."""
    context = ambient_context()
    if context is not None:
        event_dict.setdefault("user_id", context.user_id)
        event_dict.setdefault("request_id", context.request_id)
        event_dict.setdefault("thread_id", context.thread_id)
        event_dict.setdefault("run_id", context.run_id)
    return event_dict
