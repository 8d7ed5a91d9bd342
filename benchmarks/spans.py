"""What the ledger is held against: spans of the OpenTelemetry SDK with its defaults, exported by OTLP over HTTP.

The receiver is a process of its own: ``python -m benchmarks.spans``, which prints its port.
"""

import asyncio
import subprocess
import sys
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from ucm_middleware.audit.records import Row

SDK_QUEUE: Final = 2048
"""How many spans wait at most by default."""

_received: Final[list[bytes]] = []


class _Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted, and parses it only when asked how many spans are in it: that is not to be measured."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        _received.append(self.rfile.read(int(self.headers["content-length"])))
        self._answer(b"")

    def do_GET(self) -> None:
        requests = [ExportTraceServiceRequest.FromString(body) for body in _received]
        _received.clear()
        resources = [resource for request in requests for resource in request.resource_spans]
        number = sum(len(scope.spans) for resource in resources for scope in resource.scope_spans)
        self._answer(str(number).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Say nothing."""


@contextmanager
def receiver() -> Generator[str]:
    """A receiver in another process. Gives its URL."""
    with subprocess.Popen([sys.executable, "-m", "benchmarks.spans"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class Spans:
    """A tracer that exports to a receiver, all defaults but for a queue that loses none of ``capacity`` spans."""

    def __init__(self, url: str, capacity: int) -> None:
        self._url = url
        self._provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=max(capacity, SDK_QUEUE)))
        self._tracer = self._provider.get_tracer("benchmarks")

    async def write(self, row: Row) -> None:
        """A span with the fields of the record, as what they are when a person reads them."""
        core = f"{row[4]:032x}"
        with self._tracer.start_as_current_span(row[0]) as span:
            span.set_attributes(
                {
                    "enduser.pseudo.id": row[2] or "",
                    "ucm.record.id": f"{row[12]:032x}",
                    "ucm.context.id": f"context_{core}",
                    "ucm.request.id": f"request_{core}",
                    "ucm.thread.id": f"thread_{core}",
                    "ucm.run.id": f"run_thread_{core}_{core}",
                    "ucm.event": row[0],
                    "ucm.outcome": row[8],
                    "ucm.source": "connection",
                    "ucm.isolation_verified": True,
                }
            )
        await asyncio.sleep(0)  # others take their turn, as they do where one waits for the ledger

    def finish(self) -> None:
        """Export what is left."""
        self._provider.force_flush()

    def close(self, written: Sequence[Row]) -> None:
        """Raises RuntimeError when not every span has arrived."""
        self._provider.shutdown()
        with urllib.request.urlopen(self._url) as answer:
            arrived = int(answer.read())
        if arrived != len(written):
            raise RuntimeError(f"{arrived} of {len(written)} spans arrived")


def main() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Receiver) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
