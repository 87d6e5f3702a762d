"""The stream of steps as the closing of windows sees it."""

from __future__ import annotations

from shared import subjects
from shared.bus import Bus
from shared.streams import Barrier, ack_floor, stream_end

NAME = subjects.RECORDER_STEPS.stream


class StepStream:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def end(self) -> Barrier:
        return await stream_end(self._bus, NAME)

    async def floor(self) -> int:
        return await ack_floor(self._bus, subjects.RECORDER_STEPS)
