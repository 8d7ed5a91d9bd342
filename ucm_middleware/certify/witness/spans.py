"""The spans of the application, where it has OpenTelemetry's SDK."""

from collections.abc import Callable
from typing import Any

from opentelemetry import trace


def watch_spans(number: Callable[[], int | None], look: Callable[[int | None, Any], None]) -> str | None:
    """Look at each span that ends from now on. Returns why that cannot be done, or None.

    An application that has set up no provider is given one that exports nothing.
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
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(Watching())
    return None
