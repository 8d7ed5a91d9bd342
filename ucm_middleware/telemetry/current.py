"""Which span is the current one: the server's before there is a context, and then the context's."""

from collections.abc import Callable
from functools import partial

from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, Span, SpanKind, get_current_span, set_span_in_context


def let_server_span_in(outside: Callable[[Callable[[], Span]], Span] | None) -> None:
    """Make the server's span the current one in the fresh Context that this is called in, and nothing else of it:
    no baggage, which a client may have sent.

    ``outside`` calls in the Context outside of the firewall. What is there may be what another request left behind:
    its current span is believed only when it is the server's, of a request under way, or no more than an id, as one
    that is not sampled is.
    """
    span = get_current_span()
    if not span.get_span_context().is_valid:
        span = INVALID_SPAN if outside is None else outside(get_current_span)
        if not _is_of_a_request(span):
            return
    attach(set_span_in_context(span, Context()))


def make_current(span: Span) -> Callable[[], None]:
    """Make a span the current one here. Returns what undoes it."""
    outer = get_current()
    inner = set_span_in_context(span)
    attach(inner)
    return partial(_leave, inner, outer)


def leave_nothing() -> None:
    """Undo what was not done."""


def _is_of_a_request(span: Span) -> bool:
    if isinstance(span, NonRecordingSpan):
        return span.get_span_context().is_valid
    return span.is_recording() and getattr(span, "kind", None) is SpanKind.SERVER


def _leave(inner: Context, outer: Context) -> None:
    if get_current() is inner:  # not in a generator that was broken off, which is closed in another Context
        attach(outer)
