"""The stream of steps as the closing of windows sees it, and what is purged of it."""

from __future__ import annotations

from datetime import UTC, datetime

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from services.recorder.retention_domain import Held
from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.streams import Barrier, ack_floor, stream_end

NAME = subjects.RECORDER_STEPS.stream


class StepStream:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def end(self) -> Barrier:
        return await stream_end(self._bus, NAME)

    async def floor(self) -> int:
        return await ack_floor(self._bus, subjects.RECORDER_STEPS)

    # purging --------------------------------------------------------------------------------------
    async def held(self) -> Held:
        try:
            info = await self._bus.js.stream_info(NAME)
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {NAME} did not answer: {error!r}") from error
        limit = info.config.max_bytes or 0
        return Held(info.state.first_seq, info.state.bytes / limit if limit > 0 else 0.0)

    async def first_since(self, instant: datetime, first: int, last: int) -> int:
        """By halving: messages lie in the order of their times, with gaps where some were deleted."""
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
            message = await self._bus.js.get_msg(NAME, sequence, subject=subjects.RECORDER_STEPS.subject, next=True)
        except NotFoundError:  # nothing lies from there on
            return False
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {NAME} did not give a message: {error!r}") from error
        if message.time is None or message.seq is None or message.seq >= end:
            return False
        return message.time.astimezone(UTC) < instant

    async def purge_below(self, sequence: int) -> None:
        try:
            await self._bus.js.purge_stream(NAME, seq=sequence)
        except (NatsError, APIError, TimeoutError) as error:
            raise RetryLaterError(f"stream {NAME} was not purged: {error!r}") from error
