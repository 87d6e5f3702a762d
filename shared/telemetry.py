"""Logs, one JSON line an event, and the metrics that every service has.

Labels are services, subjects by their name in ``shared.subjects`` and outcomes: never ids.
"""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge, Histogram

HANDLED = Counter("ratchet_messages_total", "Messages handled, by what became of them", ["consumer", "disposition"])
HANDLE_SECONDS = Histogram(
    "ratchet_handle_seconds",
    "Seconds from fetch to disposition of a batch",
    ["consumer"],
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300),
)
PUBLISHED = Counter("ratchet_published_total", "Loop events published", ["subject"])
TASK_FAILURES = Counter("ratchet_task_failures_total", "Rounds of a periodic task that raised", ["task"])
PENDING = Gauge(
    "ratchet_consumer_pending", "Messages in the stream that a consumer has not been given yet", ["consumer"]
)
UNSETTLED = Gauge("ratchet_consumer_unsettled", "Messages given out and not yet acknowledged", ["consumer"])
UP = Gauge("ratchet_up", "1 while the service runs", ["service"])


def configure_logging(service: str, level: str = "INFO") -> None:
    """Everything this process logs, its libraries' lines too, becomes one JSON object a line on stderr."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "nats", "uvicorn.access", "faststream", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def logger() -> structlog.stdlib.BoundLogger:
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log
