"""A span processor for OpenTelemetry's SDK, by its shape: spans of one user with another's protected value in them."""

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.egress.logs import Guarded
from ucm_middleware.egress.tokens import as_bytes
from ucm_middleware.forking import renewed_after_fork

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
else:
    SpanProcessor = object  # the SDK need not be there: only its shape matters

_MOST_OPEN: Final = 10_000


class EgressSpanProcessor(SpanProcessor):
    """Give it to the SDK: ``provider.add_span_processor(EgressSpanProcessor(manager))``.

    A span is the user's in whose context it began. What is found in its name, attributes and events when it ends is put
    on record; a processor can hold nothing back.
    """

    def __init__(self, manager: Guarded) -> None:
        self._manager = manager
        self._open: dict[int, UserExecutionContext] = {}
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """A child has a lock of its own."""
        self._lock = threading.Lock()

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """A span begins."""
        context = ambient_context()
        if context is not None and self._manager.egress is not None:
            with self._lock:
                self._open[span.get_span_context().span_id] = context
                while len(self._open) > _MOST_OPEN:
                    del self._open[next(iter(self._open))]

    def on_end(self, span: Any) -> None:
        """A span has ended."""
        with self._lock:
            context = self._open.pop(span.get_span_context().span_id, None)
        guard = self._manager.egress
        if guard is None or context is None:
            return
        exchange = getattr(context._root, "_exchange", None)  # pyright: ignore[reportPrivateUsage]
        texts = [("name", str(span.name)), *_texts(span.attributes)]
        texts.append(("status", getattr(getattr(span, "status", None), "description", None) or ""))
        for event in span.events or ():
            texts.append(("event", str(event.name)))
            texts += [(f"event.{name}", text) for name, text in _texts(event.attributes)]
        for link in span.links or ():
            texts += [(f"link.{name}", text) for name, text in _texts(link.attributes)]
        for name, text in texts:
            hits = guard.hits(as_bytes(f"{name}\n{text}"), context.user_id, exchange, "span", name)
            if hits:
                guard.report(context.user_id, hits, is_blocked=False)

    def _on_ending(self, span: Any) -> None:
        """Asked by the SDK before a span ends; there is nothing to do."""

    def shutdown(self) -> None:
        """Nothing is kept that must be written."""
        with self._lock:
            self._open.clear()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Likewise."""
        return True


def _texts(attributes: Mapping[str, Any] | None) -> Iterable[tuple[str, str]]:
    for name, value in (attributes or {}).items():
        values = cast("Iterable[object]", value) if isinstance(value, list | tuple) else (value,)
        for item in values:
            if isinstance(item, str):
                yield name, item
