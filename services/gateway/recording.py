"""Calls on their way to ``calls.<agent_id>``: acknowledged before the reply, or later while the broker is away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge
from ratchet_sdk.events import MAX_EVENT_BYTES, LlmCallMade, message_id
from ratchet_sdk.jetstream import JetStream, Message, NeverError

from shared import subjects
from shared.bus import Bus
from shared.telemetry import logger

RECORDS = Counter("ratchet_gateway_records_total", "LLM calls recorded, by when the broker had them", ["outcome"])
BACKLOG = Gauge("ratchet_gateway_records_waiting", "LLM calls that the broker has not acknowledged yet")

GZIP_OVER_BYTES = 32 * 1024
AT_ONCE = 64
FLUSH_S = 4.0


@dataclass(eq=False)
class _Record(Message):
    stored: asyncio.Event = field(default_factory=asyncio.Event)
    delayed: bool = False


class Records:
    """Publishes calls in order, as many at once as came while the last ones were on their way.

    What the broker does not take is tried again under the same id.
    """

    def __init__(self, bus: Bus, *, wait_s: float, backlog: int) -> None:
        self._bus = bus
        self._wait_s = wait_s
        self._limit = backlog
        self._js: JetStream | None = None
        self._waiting: deque[_Record] = deque()
        self._draining = asyncio.Lock()
        self._drain_now: asyncio.Task[None] | None = None

    async def put(self, agent_id: str, event: LlmCallMade) -> None:
        """Returns once the stream has the event, or once it waits in memory. Never raises for an absent broker."""
        record = _record(agent_id, event)
        if record is None:
            RECORDS.labels("too_large").inc()
            logger().error("record_too_large", agent=agent_id, trajectory=event.trajectory_id, limit=MAX_EVENT_BYTES)
            return
        if len(self._waiting) >= self._limit:
            RECORDS.labels("lost").inc()
            logger().error("record_lost", message=record.message_id, waiting=len(self._waiting))
            return
        self._waiting.append(record)
        if self._bus.nc.is_connected:
            if not self._draining.locked() and (self._drain_now is None or self._drain_now.done()):
                self._drain_now = asyncio.create_task(self.drain(), name="gateway-records")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(record.stored.wait(), self._wait_s)
        record.delayed = True
        BACKLOG.set(len(self._waiting))

    async def drain(self) -> None:
        """Publish what waits, while the broker takes it."""
        async with self._draining:
            while self._waiting and self._bus.nc.is_connected and await self._drain_some():
                pass

    async def _drain_some(self) -> bool:
        """One batch from the head of what waits. False where the broker did not take all of it."""
        some = [self._waiting[place] for place in range(min(AT_ONCE, len(self._waiting)))]
        results = await self._jetstream().store(some)
        failed = []
        for record, result in zip(some, results, strict=True):
            self._waiting.popleft()
            match result:
                case None:
                    RECORDS.labels("delayed" if record.delayed else "acknowledged").inc()
                    record.stored.set()
                case NeverError():
                    RECORDS.labels("lost").inc()
                    logger().error("record_lost", message=record.message_id, error=str(result))
                case _:
                    failed.append(record)
        self._waiting.extendleft(reversed(failed))
        BACKLOG.set(len(self._waiting))
        return not failed

    def _jetstream(self) -> JetStream:
        if self._js is None:
            self._js = JetStream(self._bus.nc)
            self._bus.on_disconnect.append(self._js.give_up)
        return self._js

    async def flush(self) -> None:
        """At shutdown: a last try, bounded, and a word about what is lost."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.drain()
                while self._waiting:
                    await asyncio.sleep(0.05)
                    await self.drain()
        except TimeoutError:
            RECORDS.labels("lost").inc(len(self._waiting))
            logger().error("records_lost", count=len(self._waiting), action="the broker was away at shutdown")


def _record(agent_id: str, event: LlmCallMade) -> _Record | None:
    data = event.model_dump_json(by_alias=True).encode()
    if len(data) > MAX_EVENT_BYTES:
        return None
    subject, name = subjects.calls(agent_id), message_id(agent_id, event.event_id)
    if len(data) <= GZIP_OVER_BYTES:
        return _Record(subject, data, name)
    return _Record(subject, gzip.compress(data, compresslevel=1), name, {"Content-Encoding": "gzip"})
