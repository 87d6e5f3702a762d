"""Agent Lightning: spans into its store in this process' memory. Nothing is kept when the process ends."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version

from agentlightning.store.memory import InMemoryLightningStore
from agentlightning.types import OtelResource, Span, TraceStatus
from spans import SpanMade, arguments, made, tell


def span_of(one: SpanMade, place: int, rollout_id: str, attempt_id: str) -> Span:
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=place,
        trace_id=f"{one.trace:032x}",
        span_id=f"{one.span:016x}",
        parent_id=None,
        name="step",
        status=TraceStatus(status_code="OK"),
        attributes={"input.value": one.text},
        events=[],
        links=[],
        start_time=one.start_ns / 1e9,
        end_time=one.start_ns / 1e9,
        context=None,
        parent=None,
        resource=OtelResource(attributes={}, schema_url=""),
    )


async def run() -> None:
    count, size_bytes, _ = arguments()
    store = InMemoryLightningStore()
    rollout = await store.start_rollout(input="bench")
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    batches, place = made(count, size_bytes), 0
    began = time.perf_counter()
    for batch in batches:
        await store.add_many_spans([span_of(one, place + n, *ids) for n, one in enumerate(batch, 1)])
        place += len(batch)
    seconds = time.perf_counter() - began
    tell(version("agentlightning"), count, seconds, len(await store.query_spans(*ids)))


if __name__ == "__main__":
    asyncio.run(run())
