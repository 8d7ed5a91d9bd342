"""An OpenTelemetry SDK for one test, which keeps its spans in memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ucm_middleware.audit import AuditRecord
from ucm_middleware.ids import core_text

RECORD_KEYS = "ucm.record.id", "ucm.record.closed_id"


class Sdk:
    """What was exported, and what can be set up further."""

    def __init__(self, **settings: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**settings)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.tracer = self.provider.get_tracer("test")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended, in that order."""
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The one span of this name."""
        [span] = self.named(name)
        return span

    def add(self, processor: SpanProcessor) -> None:
        self.provider.add_span_processor(processor)

    def metric(self, name: str, **attributes: str) -> float:
        """The sum of a metric over the points that have these attributes (with ``_`` for each ``.``)."""
        data = self._reader.get_metrics_data()
        points = [
            point
            for resource in (() if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]
        wanted = {key.replace("_", "."): value for key, value in attributes.items()}
        found = [point for point in points if wanted.items() <= dict(point.attributes or {}).items()]
        return sum(float(getattr(point, "value", getattr(point, "count", 0))) for point in found)


@contextmanager
def installed(sdk: Sdk) -> Iterator[Sdk]:
    """Make it the one that the API finds: ``set_tracer_provider`` works once in a process, and there are more tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opentelemetry.trace._TRACER_PROVIDER", sdk.provider)
        patch.setattr("opentelemetry.metrics._internal._METER_PROVIDER", sdk.meters)
        yield sdk
    sdk.provider.shutdown()
    sdk.meters.shutdown()


def about(span: ReadableSpan) -> Mapping[str, Any]:
    """Its attributes."""
    return span.attributes or {}


def context_of(span: ReadableSpan) -> Any:
    """Its span context, which is there."""
    assert span.context is not None
    return span.context


def carried(spans: Sequence[ReadableSpan]) -> list[tuple[str, int, int]]:
    """Each record id that a span has, with the trace and the span, sorted."""
    found = [
        (about(span)[key], context_of(span).trace_id, context_of(span).span_id)
        for span in spans
        for key in RECORD_KEYS
        if key in about(span)
    ]
    return sorted(found)


def written(records: Sequence[AuditRecord]) -> list[tuple[str, int, int]]:
    """The same of records."""
    return sorted((core_text(record.record_id), record.trace_id, record.span_id) for record in records)
