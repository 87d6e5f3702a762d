"""Inbound: resolved windows, one at a time, for each may ask a judge many things."""

from __future__ import annotations

from services.scorer.service import Scorer
from shared import subjects
from shared.bus import Bus
from shared.events import WindowResolved


def subscribe(bus: Bus, service: Scorer) -> None:
    async def resolved(event: WindowResolved) -> None:
        await service.window_resolved(event)

    bus.consume(subjects.SCORER_RESOLVED, WindowResolved, resolved, batch_size=1)
