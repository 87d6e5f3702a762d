"""What all its consumers have settled leaves its stream: a day later, or at once where the stream is filling up.

Each stream has one service that lets go of it (invariant 13); ``DEAD``, which nobody consumes, is emptied by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError
from prometheus_client import Counter, Gauge

from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.streams import settled_through
from shared.telemetry import logger

STAYS = timedelta(days=1)
PURGE_S = 60.0
FULL = 0.5  # a stream that refuses loses nothing, but its publishers wait: what is settled makes room before that

PURGED = Counter("ratchet_purged_total", "Messages that all consumers had settled, and that were let go of", ["stream"])
FILLED = Gauge("ratchet_stream_filled", "Which part of its limit a stream takes; at 1 it refuses", ["stream"])


@dataclass(frozen=True)
class Held:
    """What lies in a stream: its first sequence, and which part of its limit is taken (0 where it has none)."""

    first: int
    filled: float
    last: int = 0
    created: datetime | None = None


def stays_from(held: Held, floor: int, young: int) -> int:
    """The first sequence that stays. Only what is settled goes, up to the ``floor``: what is a day old (before
    ``young``), or all of it where the stream is half full. The day is for a database that is restored from a backup.
    """
    return floor + 1 if held.filled >= FULL else min(young, floor + 1)


def _now() -> datetime:
    return datetime.now(UTC)


class Purging:
    """Of one stream. Any replica may do it, and several at once."""

    def __init__(self, bus: Bus, stream: str, now: Callable[[], datetime] = _now) -> None:
        self._bus = bus
        self._name = stream
        self._consumers = [consumer for consumer in subjects.CONSUMERS if consumer.stream == stream]
        self._now = now
        self._before: Held | None = None

    async def round(self) -> None:
        """Up to the floor of the slowest consumer. Raises RetryLaterError where one is missing: nothing goes then."""
        held = await self.held()
        # An idle consumer has settled what lay there a round ago; the broker counts a moment after it has stored.
        same = self._before is not None and self._before.created == held.created
        idle_through = self._before.last if self._before is not None and same else 0
        self._before = held
        floor = min([await settled_through(self._bus, consumer, idle_through) for consumer in self._consumers])
        if floor < held.first:
            return
        young = await self.first_since(self._now() - STAYS, held.first, floor)
        first = stays_from(held, floor, young)
        if first > held.first:
            await self._purge_below(first)
            PURGED.labels(self._name).inc(first - held.first)
            logger().info("purged", stream=self._name, below=first, of_age=young, filled=round(held.filled, 3))

    async def held(self) -> Held:
        """What lies there now; its fill becomes a metric."""
        try:
            info = await self._bus.js.stream_info(self._name)
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {self._name} did not answer: {error!r}") from error
        limit = info.config.max_bytes or 0
        filled = info.state.bytes / limit if limit > 0 else 0.0
        FILLED.labels(self._name).set(filled)
        return Held(info.state.first_seq, filled, info.state.last_seq, info.created)

    async def first_since(self, instant: datetime, first: int, last: int) -> int:
        """The first sequence of [first, last] that was published at or after an instant; last + 1 if none.

        By halving: messages lie in the order of their times, with gaps where some were deleted.
        """
        end = last + 1
        while first < end:
            middle = (first + end) // 2
            if await self._published_before(middle, end, instant):
                first = middle + 1
            else:
                end = middle
        return first

    async def _published_before(self, sequence: int, end: int, instant: datetime) -> bool:
        """Whether the first message from a sequence on is older; what lies at ``end`` or beyond is not looked at."""
        try:
            message = await self._bus.js.get_msg(self._name, sequence, subject=">", next=True)
        except NotFoundError:  # nothing lies from there on
            return False
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {self._name} did not give a message: {error!r}") from error
        if message.time is None or message.seq is None or message.seq >= end:
            return False
        return message.time.astimezone(UTC) < instant

    async def _purge_below(self, sequence: int) -> None:
        try:
            await self._bus.js.purge_stream(self._name, seq=sequence)
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {self._name} was not purged: {error!r}") from error
