"""The recorder's use case for events: a batch of messages becomes rows, a bad one a dead letter."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Counter

from services.recorder.domain import Received
from services.recorder.intake import read
from services.recorder.settings import RecorderSettings
from shared.delivery import Ack, Dead, Delivery, Disposition
from shared.errors import GiveUpError

INLINE_BYTES = 1024 * 1024  # a hundredth of a second's work, which a thread would take longer for
TOGETHER_BYTES = 4 * 1024 * 1024  # of JSON that is held, parsed, at a time: gzip hides how much a batch will be

STORED = Counter("ratchet_recorder_events_total", "Events stored (or known already)", ["kind"])
DEAD = Counter("ratchet_recorder_dead_total", "Events that became dead letters", ["cause"])
LATE = Counter("ratchet_recorder_late_total", "Runs that came after their window's barrier")


@dataclass(frozen=True)
class Kept:
    """What became of a batch: dead ones by sequence with the reason, closed windows it touched, new late runs."""

    dead: Mapping[int, str]
    closed: frozenset[str]
    new_late: int


class Store(Protocol):
    async def keep(self, events: Sequence[Received], window_s: int) -> Kept: ...
    async def recount_late(self, window_ids: Iterable[str]) -> None: ...


class Recording:
    def __init__(self, store: Store, settings: RecorderSettings) -> None:
        self._store = store
        self._settings = settings

    async def take_in(self, deliveries: Sequence[Delivery]) -> list[Disposition]:
        """Store a batch. A bad event is dead alone; a lost database raises, and all of them come again."""
        dead: dict[int, str] = {}
        coming = iter(deliveries)
        # Large ones in a thread, for they would hold up the health endpoint.
        large = sum(len(delivery.data) for delivery in deliveries) > INLINE_BYTES
        while events := await asyncio.to_thread(self._read, coming, dead) if large else self._read(coming, dead):
            kept = await self._keep(events)
            if kept.closed:
                await self._store.recount_late(kept.closed)
            DEAD.labels("conflict").inc(len(kept.dead))
            LATE.inc(kept.new_late)
            kinds = collections.Counter(event.event.kind for event in events if event.sequence not in kept.dead)
            for kind, number in kinds.items():
                STORED.labels(kind).inc(number)
            dead |= kept.dead
        return [Dead(dead[d.sequence]) if d.sequence in dead else Ack() for d in deliveries]

    def _read(self, coming: Iterator[Delivery], dead: dict[int, str]) -> list[Received]:
        """Parse, hash and compress the next ones, as many as are held at a time; none where all were read."""
        events: list[Received] = []
        size_bytes = 0
        for delivery in coming:
            try:
                events.append(read(delivery))
            except GiveUpError as error:
                dead[delivery.sequence] = str(error)
                DEAD.labels("malformed").inc()
                continue
            if (size_bytes := size_bytes + events[-1].size_bytes) > TOGETHER_BYTES:
                break
        return events

    async def _keep(self, events: Sequence[Received]) -> Kept:
        """Store as one; where a value is refused, halve until the one that bears it is alone."""
        try:
            return await self._store.keep(events, self._settings.window_s)
        except GiveUpError as error:
            if len(events) == 1:
                return Kept({events[0].sequence: str(error)}, frozenset(), 0)
        half = len(events) // 2
        one, other = await self._keep(events[:half]), await self._keep(events[half:])
        return Kept({**one.dead, **other.dead}, one.closed | other.closed, one.new_late + other.new_late)
