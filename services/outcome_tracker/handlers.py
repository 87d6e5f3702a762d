"""Inbound: facts of the world in batches, closed windows one by one."""

from __future__ import annotations

from services.outcome_tracker.service import OutcomeTracker
from shared import subjects
from shared.bus import Bus
from shared.events import WindowClosed


def subscribe(bus: Bus, service: OutcomeTracker) -> None:
    async def closed(event: WindowClosed) -> None:
        await service.window_closed(event)

    bus.consume_batches(subjects.TRACKER_OUTCOMES, service.take_in)
    bus.consume(subjects.TRACKER_CLOSED, WindowClosed, closed)
