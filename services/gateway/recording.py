"""Calls on their way to ``steps.<agent_id>``: acknowledged before the reply, or later while the broker is away."""

from __future__ import annotations

import asyncio
import gzip
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge
from ratchet_sdk.events import MAX_EVENT_BYTES, LlmCallMade, message_id

from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.telemetry import logger

RECORDS = Counter("ratchet_gateway_records_total", "LLM calls recorded, by when the broker had them", ["outcome"])
BACKLOG = Gauge("ratchet_gateway_records_waiting", "LLM calls that the broker has not acknowledged yet")

GZIP_OVER_BYTES = 32 * 1024
AT_ONCE = 64
FLUSH_S = 4.0


@dataclass(frozen=True)
class _Record:
    subject: str
    data: bytes
    message_id: str
    headers: dict[str, str] = field(default_factory=dict)


class Records:
    """Publishes calls. What the broker does not take within ``wait_s`` is tried again under the same id."""

    def __init__(self, bus: Bus, *, wait_s: float, backlog: int) -> None:
        self._bus = bus
        self._wait_s = wait_s
        self._limit = backlog
        self._waiting: deque[_Record] = deque()
        self._draining = asyncio.Lock()

    async def put(self, agent_id: str, event: LlmCallMade) -> None:
        """Returns once the stream has the event, or once it waits in memory. Never raises for an absent broker."""
        record = _record(agent_id, event)
        if record is None:
            RECORDS.labels("too_large").inc()
            logger().error("record_too_large", agent=agent_id, trajectory=event.trajectory_id, limit=MAX_EVENT_BYTES)
            return
        if self._bus.nc.is_connected:
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._publish(record)
            except (RetryLaterError, TimeoutError):
                pass
            else:
                RECORDS.labels("acknowledged").inc()
                return
        self._delay(record)

    def _delay(self, record: _Record) -> None:
        if len(self._waiting) >= self._limit:
            RECORDS.labels("lost").inc()
            logger().error("record_lost", message=record.message_id, waiting=len(self._waiting))
            return
        self._waiting.append(record)
        BACKLOG.set(len(self._waiting))

    async def drain(self) -> None:
        """Publish what waits, while the broker takes it."""
        async with self._draining:
            await self._drain()

    async def _drain(self) -> None:
        while self._waiting and self._bus.nc.is_connected:
            some = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            try:
                results = await asyncio.gather(*map(self._publish, some), return_exceptions=True)
            except asyncio.CancelledError:
                self._waiting.extendleft(reversed(some))
                raise
            failed = [record for record, result in zip(some, results, strict=True) if result is not None]
            self._waiting.extendleft(reversed(failed))
            RECORDS.labels("delayed").inc(len(some) - len(failed))
            BACKLOG.set(len(self._waiting))
            if failed:
                return

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

    async def _publish(self, record: _Record) -> None:
        await self._bus.publish(record.subject, record.data, record.message_id, record.headers)


def _record(agent_id: str, event: LlmCallMade) -> _Record | None:
    data = event.model_dump_json(by_alias=True).encode()
    if len(data) > MAX_EVENT_BYTES:
        return None
    subject, name = subjects.steps(agent_id), message_id(agent_id, event.event_id)
    if len(data) <= GZIP_OVER_BYTES:
        return _Record(subject, data, name)
    return _Record(subject, gzip.compress(data, compresslevel=1), name, {"Content-Encoding": "gzip"})
