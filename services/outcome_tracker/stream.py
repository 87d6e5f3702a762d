"""Where the stream of outcomes ends, and how far we have stored it."""

from __future__ import annotations

from services.outcome_tracker.domain import Mark, Position
from shared import subjects
from shared.bus import Bus
from shared.streams import ack_floor, stream_end


class OutcomeStream:
    """The end is read first: what the floor has then reached is at least what the end demands."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def position(self) -> Position:
        end = await stream_end(self.bus, subjects.TRACKER_OUTCOMES.stream)
        floor = await ack_floor(self.bus, subjects.TRACKER_OUTCOMES)
        return Position(Mark(end.created, end.sequence), floor)
