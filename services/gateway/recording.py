"""Calls on their way to ``calls.<agent_id>``: acknowledged before the reply, or on disk while the broker is away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge
from ratchet_sdk.events import MAX_EVENT_BYTES, LlmCallMade, message_id
from ratchet_sdk.jetstream import JetStream, Message, NeverError
from ratchet_sdk.spool import Spool
from ratchet_sdk.values import encoded

from services.gateway.backlog import GZIPPED, Backlog, message_of
from services.gateway.record_domain import lighter
from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.telemetry import logger

RECORDS = Counter("ratchet_gateway_records_total", "LLM calls recorded, by when the broker had them", ["outcome"])
BACKLOG = Gauge("ratchet_gateway_records_waiting", "LLM calls that the broker has not acknowledged yet")

GZIP_OVER_BYTES = 32 * 1024
AT_ONCE = 64
READ_BYTES = 8 * 1024 * 1024  # of the backlog at once
FLUSH_S = 4.0


@dataclass(eq=False)
class _Record(Message):
    """``settled``: the broker has it, or can never have it. ``spooled``: the disk has it, which sends it again."""

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    held: bool = False  # in memory, among those that wait or in flight
    spooled: bool = False
    delayed: bool = False


class Records:
    """Publishes calls, as many at once as came while the last ones were on their way.

    What the broker does not take in time is kept on disk, of bounded size, and tried again under the same id, also by
    the process that comes after this one. What is in memory is bounded too, in ``memory_bytes``.
    """

    def __init__(self, bus: Bus, spool: Spool, *, wait_s: float, memory_bytes: int) -> None:
        self._bus = bus
        self._wait_s = wait_s
        self._memory_bytes = memory_bytes
        self._backlog = Backlog(spool)
        self._js: JetStream | None = None
        self._waiting: deque[_Record] = deque()
        self._held_bytes = 0  # of what waits or is in flight
        self._draining = asyncio.Lock()
        self._drain_now: asyncio.Task[None] | None = None

    async def put(self, agent_id: str, event: LlmCallMade) -> None:
        """Returns once the stream or the disk has the event. Never raises for an absent broker."""
        record = _record(agent_id, event)
        if record is None:
            RECORDS.labels("too_large").inc()
            logger().error("record_too_large", agent=agent_id, trajectory=event.trajectory_id, limit=MAX_EVENT_BYTES)
            return
        if self._bus.nc.is_connected and self._hold(record):
            if not self._draining.locked() and (self._drain_now is None or self._drain_now.done()):
                self._drain_now = asyncio.create_task(self.drain(), name="gateway-records")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(record.settled.wait(), self._wait_s)
        if not record.settled.is_set():
            await self._spool(record)
        self._measure()

    def _hold(self, record: _Record) -> bool:
        """Let it wait in memory, where there is room."""
        if self._held_bytes + len(record.data) > self._memory_bytes:
            return False
        self._waiting.append(record)
        self._held_bytes += len(record.data)
        record.held = True
        return True

    def _release(self, record: _Record) -> None:
        record.held = False
        self._held_bytes -= len(record.data)

    async def _spool(self, record: _Record) -> None:
        """Keep it on disk; where that has no room, in memory; else it is lost, which is counted."""
        record.delayed = True
        record.spooled = await self._backlog.keep(record)
        if record.spooled and record in self._waiting:
            self._waiting.remove(record)
            self._release(record)
        elif not (record.spooled or record.held or record.settled.is_set() or self._hold(record)):
            self._lost(record, "neither the broker nor the disk takes it, and memory is full")

    def _lost(self, record: Message, why: str) -> None:
        RECORDS.labels("lost").inc()
        logger().error("record_lost", message=record.message_id, reason=why)

    async def drain(self) -> None:
        """Publish what waits, in memory and on disk, while the broker takes it."""
        async with self._draining:
            while self._bus.nc.is_connected and (self._waiting or self._backlog.pending):
                if self._waiting and not await self._drain_some():
                    break
                if self._backlog.pending and not await self._drain_backlog():
                    break
        self._measure()

    async def _drain_some(self) -> bool:
        """One batch from the head of what waits in memory. False where the broker did not take all of it."""
        some = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
        results: list[Exception | None] = [RetryLaterError("not tried to the end")] * len(some)
        try:
            results = await self._jetstream().store(some)
        finally:
            for record, result in zip(reversed(some), reversed(results), strict=True):
                self._settle(record, result)
        return not any(record.held for record in some)

    def _settle(self, record: _Record, result: Exception | None) -> None:
        """What became of a record that was in flight; one that failed goes back to the head, unless the disk has it."""
        if result is None:
            RECORDS.labels("delayed" if record.delayed else "acknowledged").inc()
            record.settled.set()
        elif isinstance(result, NeverError):
            self._lost(record, str(result))
            record.settled.set()
        elif not record.spooled:
            self._waiting.appendleft(record)
            return
        self._release(record)

    async def _drain_backlog(self) -> bool:
        """One batch of what is on disk. False where the broker did not take all of it."""
        some = await self._backlog.read(AT_ONCE, READ_BYTES)
        messages = [message_of(spooled) for spooled in some]
        done = 0
        for message, result in zip(messages, await self._jetstream().store(messages) if some else [], strict=True):
            if isinstance(result, NeverError):
                self._lost(message, str(result))
            elif result is not None:
                break
            else:
                RECORDS.labels("delayed").inc()
            done += 1
        if done:
            await self._backlog.done(some[:done])
        return done == len(some)

    def _measure(self) -> None:
        BACKLOG.set(len(self._waiting) + self._backlog.pending)

    def _jetstream(self) -> JetStream:
        if self._js is None:
            self._js = JetStream(self._bus.nc)
            self._bus.on_disconnect.append(self._js.give_up)
        return self._js

    async def flush(self) -> None:
        """At shutdown: a last try, bounded. What is left stays on disk for the process that comes next."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self.drain()
        await asyncio.gather(*(self._spool(record) for record in list(self._waiting)))
        if self._backlog.pending:
            logger().warning(
                "records_spooled", count=self._backlog.pending, action="they go when a gateway starts here"
            )
        if self._waiting:
            RECORDS.labels("lost").inc(len(self._waiting))
            logger().error("records_lost", count=len(self._waiting), action="neither broker nor disk took them")

    def close(self) -> None:
        """Let another process have the spool."""
        self._backlog.close()


def _record(agent_id: str, event: LlmCallMade) -> _Record | None:
    """The event as it is sent, without what makes it too large; None where nothing is left to leave out."""
    data = encoded(event)
    if len(data) > MAX_EVENT_BYTES:
        smaller = (encoded(lighter_event) for lighter_event in lighter(event))
        found = next((data for data in smaller if len(data) <= MAX_EVENT_BYTES), None)
        if found is None:
            return None
        data = found
        RECORDS.labels("cut").inc()
    subject, name = subjects.calls(agent_id), message_id(agent_id, event.event_id)
    if len(data) <= GZIP_OVER_BYTES:
        return _Record(subject, data, name)
    return _Record(subject, gzip.compress(data, compresslevel=1), name, dict(GZIPPED))
