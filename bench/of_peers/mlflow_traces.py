"""MLflow: spans through its SQL tracking store on Postgres, without its HTTP server before it."""

from __future__ import annotations

import json
import time
from importlib.metadata import version

from mlflow.entities.span import create_mlflow_span
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode
from spans import SpanMade, arguments, made, tell
from sqlalchemy import text


def span_of(one: SpanMade) -> object:
    trace_id = f"tr-{one.trace:032x}"
    attributes = {"mlflow.traceRequestId": json.dumps(trace_id), "mlflow.spanInputs": json.dumps(one.text)}
    return create_mlflow_span(
        ReadableSpan(
            name="step",
            context=SpanContext(one.trace, one.span, is_remote=False),
            attributes=attributes,
            status=Status(StatusCode.OK),
            start_time=one.start_ns,
            end_time=one.start_ns + 1000,
        ),
        trace_id,
        "LLM",
    )


def main() -> None:
    count, size_bytes, url = arguments()
    store = SqlAlchemyStore(url, "file:///dev/null")
    experiment = store.create_experiment("bench")
    batches = made(count, size_bytes)
    began = time.perf_counter()
    for batch in batches:
        store.log_spans(experiment, [span_of(one) for one in batch])
    seconds = time.perf_counter() - began
    with store.engine.connect() as connection:
        tell(version("mlflow"), count, seconds, connection.execute(text("select count(*) from spans")).scalar_one())


if __name__ == "__main__":
    main()
