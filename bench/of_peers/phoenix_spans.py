"""Phoenix: its server on Postgres; spans over OTLP/HTTP, 100 a request, until the last is in its table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from urllib.error import HTTPError

import sqlalchemy
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from spans import SpanMade, arguments, made, tell

START_S, KEEP_S = 120, 300


def request_of(batch: list[SpanMade]) -> bytes:
    spans = [
        Span(
            trace_id=one.trace.to_bytes(16, "big"),
            span_id=one.span.to_bytes(8, "big"),
            name="step",
            start_time_unix_nano=one.start_ns,
            end_time_unix_nano=one.start_ns + 1000,
            attributes=[KeyValue(key="input.value", value=AnyValue(string_value=one.text))],
        )
        for one in batch
    ]
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])]
    ).SerializeToString()


def post(url: str, body: bytes) -> None:
    """Until it is taken: a server whose queue is full says 503."""
    asked = urllib.request.Request(f"{url}/v1/traces", body, {"Content-Type": "application/x-protobuf"})
    while True:
        try:
            urllib.request.urlopen(asked, timeout=60).close()
            return
        except HTTPError as error:
            if error.code not in (429, 503):
                raise
            time.sleep(0.05)


def await_server(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("phoenix did not start") from None
            time.sleep(0.2)


def main() -> None:
    count, size_bytes, url = arguments()
    port = os.environ["PHOENIX_PORT"]
    server = subprocess.Popen([sys.executable, "-m", "phoenix.server.main", "serve"], stdout=sys.stderr)
    try:
        await_server(f"http://127.0.0.1:{port}", server)
        engine = sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        bodies = [request_of(batch) for batch in made(count, size_bytes)]
        began = time.perf_counter()
        for body in bodies:
            post(f"http://127.0.0.1:{port}", body)
        kept, deadline = 0, time.monotonic() + KEEP_S
        while kept < count and time.monotonic() < deadline:
            time.sleep(0.1)
            with engine.connect() as connection:
                kept = connection.execute(sqlalchemy.text("select count(*) from spans")).scalar_one()
        tell(version("arize-phoenix"), count, time.perf_counter() - began, kept)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
