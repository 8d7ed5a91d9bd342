"""What the application logs and what its spans say, while a request is answered: told where a canary is in it."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from ucm_middleware.certify.witness.asked import Asked
from ucm_middleware.certify.witness.reporter import Reporter
from ucm_middleware.certify.witness.wire import Told

_BORN_WITH = frozenset(vars(logging.makeLogRecord({})))


class Watch:
    """Looks at texts, and tells of those with a canary in them, of whichever user: whose, the runner finds out."""

    def __init__(self, reporter: Reporter, variable: ContextVar[Asked | None]) -> None:
        self._reporter = reporter
        self._variable = variable
        self._pattern = re.compile("|".join(map(re.escape, reporter.order.patterns)), re.IGNORECASE)

    def number(self) -> int | None:
        """The request that is answered here."""
        asked = self._variable.get()
        return None if asked is None else asked.number

    def look_at_log(self, record: logging.LogRecord) -> None:
        """A record, whatever handlers there are."""
        number = self.number()
        if number is not None:
            self._look("log", number, record.name, _texts_of(record))

    def look_at_span(self, number: int | None, span: Any) -> None:
        """A span that has ended."""
        if number is not None:
            events = [(event.name, dict(event.attributes or {})) for event in span.events]
            self._look("span", number, span.name, [span.name, str(dict(span.attributes or {})), str(events)])

    def _look(self, kind: Any, number: int, where: str, texts: Iterable[str]) -> None:
        for text in texts:
            if self._pattern.search(text):
                self._reporter.tell(Told(kind, number, text, where))


def _texts_of(record: logging.LogRecord) -> Iterable[str]:
    try:
        yield record.getMessage()
    except Exception:  # noqa: BLE001 - a call of the application's with the wrong arguments: logging says so itself
        yield _shown(record.msg)
    if record.exc_info and record.exc_info[1] is not None:
        yield "".join(traceback.format_exception(record.exc_info[1]))
    for name, value in vars(record).items():
        if name not in _BORN_WITH:
            yield _shown(value)


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - of the application's own; a handler that does not show it has no trouble with it
        return ""


def watch_logs(look: Callable[[logging.LogRecord], None]) -> None:
    """Look at each record that is handled from now on, whatever makes the records, with what is given as ``extra``."""
    handle = logging.Logger.handle

    def looking(self: logging.Logger, record: logging.LogRecord) -> None:
        look(record)
        handle(self, record)

    logging.Logger.handle = looking  # type: ignore[method-assign]
