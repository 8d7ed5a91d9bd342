"""Spans that carry the records of the ledger. Each record is on one span, which has its id, and whose ids it has.

The span of a context carries the record of its opening and that of its end; of a WebSocket connection, the span ends
when it is accepted, since a span does not exist for a backend before it has ended. Every other record is a span of no
length; a transaction's, as long as that took. None is a span event.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from opentelemetry.context import Context, attach
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    get_tracer_provider,
    set_span_in_context,
)

from ucm_middleware.audit.records import AuditRecord, Event, Row
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import Core, is_own_request_id
from ucm_middleware.secret import SecretRing
from ucm_middleware.telemetry.api import SCOPE, is_of_the_api
from ucm_middleware.telemetry.attributes import Attributes, attributes_of, end_attributes_of
from ucm_middleware.telemetry.current import leave_nothing, let_server_span_in, make_current
from ucm_middleware.telemetry.pseudonyms import Pseudonyms
from ucm_middleware.telemetry.quiet import Quiet


@dataclass(slots=True)
class TracedTool:
    """A call of a tool that is under way."""

    span: Span
    attributes: Attributes


@dataclass(slots=True)
class Traced:
    """An open context. ``front`` is the span that its records and children hang below; ``attributes`` are set when its
    span begins and once more when it ends, since an SDK drops the oldest when there are too many. The span of a
    connection that ``is_answered`` has ended. ``tools`` has the calls of a run by their numbers.
    """

    span: Span
    front: Span
    attributes: Attributes
    event: Event
    is_connection: bool = False
    is_answered: bool = False
    tools: dict[object, TracedTool] | None = None

    @property
    def link(self) -> Link:
        """To the span of the context."""
        return Link(self.span.get_span_context())


class Spans:
    """The spans of one manager's contexts.

    ``not_exported`` is told the event of each record that no exporter gets to see, once its span has ended.
    """

    __slots__ = ("__weakref__", "_open", "_pseudonyms", "_quiet", "_tracer", "not_exported")

    _open: dict[Core, Traced]

    def __init__(self, tracer: Tracer, pseudonyms: Pseudonyms) -> None:
        self._tracer = tracer
        self._pseudonyms = pseudonyms
        self._quiet = Quiet()
        self.not_exported: Callable[[str], None] = _nobody
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the contexts, and their spans, are the parent's."""
        self._open = {}

    # Records.

    def carry(self, row: Row) -> AuditRecord:
        """Put a record on a span. Returns the record with the ids of the span."""
        record = AuditRecord(*row)
        span = self._quiet.call(self._span_of, record)
        if span is None:
            self.not_exported(record.event)
            return record
        at = span.get_span_context()
        return record._replace(trace_id=at.trace_id, span_id=at.span_id)

    def _span_of(self, record: AuditRecord) -> Span:
        core = record.context
        if core is not None:
            if core not in self._open:
                if record.event in ("opened", "child_opened"):
                    return self._opened(core, record)
            elif record.event == "closed":
                return self._closed(core, record)
            elif record.event == "bound" and (pseudonym := self._pseudonyms.of(record.user_id)) is not None:
                self._open[core].attributes["enduser.pseudo.id"] = pseudonym
            elif record.event == "agent_run" and (span := self._tool(self._open[core], record)) is not None:
                return span
        return self._happened(record)

    def _tool(self, traced: Traced, record: AuditRecord) -> Span | None:
        """The span of a tool's call, which carries the records of its beginning and of its end."""
        about = dict(record.data)
        if about.get("phase") == "tool_executing":
            attributes = attributes_of(record, self._pseudonyms)
            where, link = self._place(traced)
            span = self._start(f"execute_tool {about.get('tool')}", where, attributes, record, link)
            if traced.tools is None:
                traced.tools = {}
            traced.tools[about.get("call")] = TracedTool(span, attributes)
            return span
        if about.get("phase") != "tool_completed" or not traced.tools:
            return None
        tool = traced.tools.pop(about.get("call"), None)
        if tool is None:
            return None
        tool.attributes.update(end_attributes_of(record))
        self._end(tool.span, tool.attributes, record.event, record.event, record=record)
        return tool.span

    def _opened(self, core: Core, record: AuditRecord) -> Span:
        attributes = attributes_of(record, self._pseudonyms)
        where: Context | None = None
        link: Link | None = None
        if record.event == "child_opened":
            about = dict(record.data)
            where, link = self._place(self._open.get(_core_of(about.get("parent_request_id"))))
            attributes["ucm.operation"] = str(about.get("operation"))
        name = "ucm context" if record.event == "opened" else "ucm child"
        span = self._start(name, where, attributes, record, link)
        self._open[core] = Traced(span, span, attributes, record.event)
        return span

    def _closed(self, core: Core, record: AuditRecord) -> Span:
        traced = self._open.pop(core)
        self._end_message(traced)
        if traced.is_connection:
            self.accept(traced)
            return self._happened(record, "ucm close", Context(), traced.link)
        traced.attributes.update(end_attributes_of(record))
        self._end(traced.span, traced.attributes, traced.event, record.event, record=record)
        return traced.span

    def _happened(
        self, record: AuditRecord, name: str | None = None, where: Context | None = None, link: Link | None = None
    ) -> Span:
        """A span for one record."""
        if where is None and record.context is not None:
            where, link = self._place(self._open.get(record.context))
        attributes = attributes_of(record, self._pseudonyms)
        span = self._start(name or f"ucm {record.event}", where, attributes, record, link)
        self._end(span, {}, record.event, record=record)
        return span

    def _place(self, traced: Traced | None) -> tuple[Context | None, Link | None]:
        """Where the spans of an open context begin, and what they are linked to: below its own, or one of the
        application's that is below that. What a WebSocket does outside of a client's message is a trace of its own.
        """
        if traced is None:
            return None, None
        current = get_current_span()
        trace_id = current.get_span_context().trace_id
        if current is not traced.span and trace_id in (_trace_of(traced.front), _trace_of(traced.span)):
            return None, None
        if traced.is_answered:
            return Context(), traced.link
        return set_span_in_context(traced.front, Context()), None

    # Contexts.

    def enter(self, context: UserExecutionContext) -> Callable[[], None]:
        """Make a context's span the current one here. Returns what undoes it."""
        traced = self._open.get(context._core)  # pyright: ignore[reportPrivateUsage]
        return leave_nothing if traced is None else make_current(traced.front)

    let_in = staticmethod(let_server_span_in)

    def name_agent(self, context: UserExecutionContext, agent_name: str) -> None:
        """The context is one run of an agent: say so as OpenTelemetry's conventions for generative AI do."""
        traced = self._open.get(context._core)  # pyright: ignore[reportPrivateUsage]
        if traced is not None:
            traced.attributes.pop("ucm.operation", None)
            traced.attributes["gen_ai.operation.name"] = "invoke_agent"
            traced.attributes["gen_ai.agent.name"] = agent_name
            traced.attributes["gen_ai.conversation.id"] = context.thread_id
            self._quiet.call(traced.span.update_name, f"invoke_agent {agent_name}")

    def enter_tool(self, context: UserExecutionContext, number: int) -> Callable[[], None]:
        """Make the span of a tool's call the current one here. Returns what undoes it."""
        traced = self._open.get(context._core)  # pyright: ignore[reportPrivateUsage]
        tool = None if traced is None or traced.tools is None else traced.tools.get(number)
        return leave_nothing if tool is None else make_current(tool.span)

    # WebSocket connections; see the module messages.

    def connect(self, context: UserExecutionContext) -> Traced | None:
        """The context is that of a WebSocket connection. None when it has ended already."""
        traced = self._open.get(context._core)  # pyright: ignore[reportPrivateUsage]
        if traced is not None:
            traced.is_connection = True
            self._quiet.call(traced.span.update_name, "ucm connection")
        return traced

    def accept(self, traced: Traced) -> None:
        """The connection is accepted, refused or over: its span ends."""
        if not traced.is_answered:
            traced.is_answered = True
            self._end(traced.span, traced.attributes, traced.event)

    def begin_message(self, context: UserExecutionContext, traced: Traced) -> None:
        """A message is being handled from now on, in a trace of its own, which is the current one here."""
        attributes = {name: value for name, value in traced.attributes.items() if not name.startswith("ucm.record.")}
        attributes["ucm.event"] = "message"
        span = self._start("ucm message", Context(), attributes, link=traced.link, kind=SpanKind.CONSUMER)
        traced.front = span
        attach(set_span_in_context(span, Context()))
        if self._open.get(context._core) is not traced:  # pyright: ignore[reportPrivateUsage]
            self._end_message(traced)  # closed in this very moment

    def end_message(self, traced: Traced) -> None:
        """The application is done with the message, and asks for the next."""
        if traced.front is not traced.span:
            self._end_message(traced)
            attach(set_span_in_context(traced.span, Context()))

    def _end_message(self, traced: Traced) -> None:
        message, traced.front = traced.front, traced.span
        if message is not traced.span:
            self._end(message, {})

    # The SDK.

    def _start(
        self,
        name: str,
        where: Context | None,
        attributes: Attributes,
        record: AuditRecord | None = None,
        link: Link | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        """A new span, below what is current when ``where`` is None. Where the SDK fails, one that does nothing."""
        span = self._quiet.call(
            self._tracer.start_span,
            name,
            context=where,
            kind=kind,
            attributes=attributes,
            links=None if link is None else [link],
            start_time=None if record is None else _nanoseconds(record.at - _took(record)),
        )
        return INVALID_SPAN if span is None else span

    def _end(
        self, span: Span, attributes: Mapping[str, str | int], *carried: Event, record: AuditRecord | None = None
    ) -> None:
        """``carried`` are the events of the records on the span, of which this one gives it its outcome and its end."""
        is_exported = span.is_recording() and span.get_span_context().trace_flags.sampled
        if span.is_recording() and self._quiet.call(_end, span, attributes, record) is None:
            is_exported = False
        if not is_exported:
            for event in carried:
                self.not_exported(event)


def find_spans(secrets: SecretRing) -> Spans | None:
    """The spans of one manager; None while no tracer provider is set, or the SDK is disabled."""
    provider = get_tracer_provider()
    if is_of_the_api(provider):
        return None
    tracer = provider.get_tracer(SCOPE)
    return None if is_of_the_api(tracer) else Spans(tracer, Pseudonyms(secrets))


def _trace_of(span: Span) -> int:
    return span.get_span_context().trace_id


def _core_of(request_id: object) -> Core:
    """The core of the context that has this request id; one that no context has where the id was given to it."""
    if not isinstance(request_id, str) or not is_own_request_id(request_id):
        return -1
    try:
        return int(request_id[-32:], 16)
    except ValueError:
        return -1


def _end(span: Span, attributes: Mapping[str, str | int], record: AuditRecord | None) -> Literal[True]:
    if attributes:
        span.set_attributes(attributes)
    if record is not None and record.outcome == "failed":
        span.set_status(Status(StatusCode.ERROR))
    span.end(None if record is None else _nanoseconds(record.at))
    return True


def _took(record: AuditRecord) -> float:
    """Seconds before the record was written. A context, and so a run of an agent, has a span of its own."""
    return record.seconds or 0.0 if record.event == "transaction" else 0.0


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)


def _nobody(event: str) -> None:
    pass
