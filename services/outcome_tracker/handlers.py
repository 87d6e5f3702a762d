"""Inbound: facts of the world in batches, closed windows one by one; commands to forget."""

from __future__ import annotations

from typing import Any

from services.outcome_tracker.service import OutcomeTracker
from shared import subjects
from shared.bus import Bus
from shared.events import WindowClosed
from shared.forgetting import ForgetRuns, RewriteTable


def subscribe(bus: Bus, service: OutcomeTracker) -> None:
    async def closed(event: WindowClosed) -> None:
        await service.window_closed(event)

    async def forget(request: ForgetRuns) -> dict[str, Any]:
        return await service.forget(request.keys)

    async def rewrite(request: RewriteTable) -> dict[str, Any]:
        return await service.rewrite(request.table)

    bus.on_command("outcome_tracker", "forget", ForgetRuns, forget)
    bus.on_command("outcome_tracker", "rewrite", RewriteTable, rewrite)
    bus.consume_batches(subjects.TRACKER_OUTCOMES, service.take_in)
    bus.consume(subjects.TRACKER_CLOSED, WindowClosed, closed)
