"""What is stored leaves its stream: a day later, or at once where the stream is filling up (invariant 13)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

from prometheus_client import Counter

from services.recorder.retention_domain import Held, stays_from
from shared.telemetry import logger

STAYS = timedelta(days=1)

PURGED = Counter("ratchet_recorder_purged_total", "Messages of the stream of steps that were stored, and let go of")


class Stream(Protocol):
    async def held(self) -> Held: ...
    async def floor(self) -> int: ...
    async def first_since(self, instant: datetime, first: int, last: int) -> int:
        """The first sequence of [first, last] that was published at or after an instant; last + 1 if none."""

    async def purge_below(self, sequence: int) -> None: ...


def _now() -> datetime:
    return datetime.now(UTC)


class Purging:
    def __init__(self, stream: Stream, now: Callable[[], datetime] = _now) -> None:
        self._stream = stream
        self._now = now

    async def round(self) -> None:
        """Any replica may do it, and several at once."""
        held, floor = await self._stream.held(), await self._stream.floor()
        if floor < held.first:
            return
        young = await self._stream.first_since(self._now() - STAYS, held.first, floor)
        first = stays_from(held, floor, young)
        if first > held.first:
            await self._stream.purge_below(first)
            PURGED.inc(first - held.first)
            logger().info("purged", below=first, of_age=young, filled=round(held.filled, 3))
