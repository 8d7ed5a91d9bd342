"""The spans of the application, where it has OpenTelemetry's SDK."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from opentelemetry import trace


def watch_spans(number: Callable[[], int | None], look: Callable[[int | None, Any], None]) -> str | None:
    """Look at each span that ends from now on, of any provider, be it made before or after. Returns why that cannot be
    done, or None.
    """
    try:
        from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
    except ImportError:
        return "the OpenTelemetry SDK is not installed"

    class Watching(SpanProcessor):
        def on_start(self, span: Span, parent_context: Any = None) -> None:
            numbers[span.get_span_context().span_id] = number()

        def on_end(self, span: Any) -> None:
            look(numbers.pop(span.get_span_context().span_id, None), span)

    numbers: dict[int, int | None] = {}
    make = TracerProvider.__init__

    def making(self: TracerProvider, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_span_processor(Watching())

    TracerProvider.__init__ = making  # type: ignore[method-assign]
    if isinstance(provider := trace.get_tracer_provider(), TracerProvider):
        provider.add_span_processor(Watching())
    return None


def provide() -> None:
    """Give an application that has set up no provider, though it is up, one that exports nothing."""
    with suppress(ImportError):
        from opentelemetry.sdk.trace import TracerProvider

        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            trace.set_tracer_provider(TracerProvider())
