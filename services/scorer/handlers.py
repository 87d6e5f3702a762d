"""Inbound: resolved windows, one at a time, for each may ask a judge many things; commands to forget."""

from __future__ import annotations

from typing import Any

from services.scorer.service import Scorer
from shared import subjects
from shared.bus import Bus
from shared.events import WindowResolved
from shared.forgetting import ForgetRuns, RewriteTable


def subscribe(bus: Bus, service: Scorer) -> None:
    async def resolved(event: WindowResolved) -> None:
        await service.window_resolved(event)

    async def forget(request: ForgetRuns) -> dict[str, Any]:
        return await service.forget(request.keys)

    async def rewrite(request: RewriteTable) -> dict[str, Any]:
        return await service.rewrite(request.table)

    bus.on_command("scorer", "forget", ForgetRuns, forget)
    bus.on_command("scorer", "rewrite", RewriteTable, rewrite)
    bus.consume(subjects.SCORER_RESOLVED, WindowResolved, resolved, batch_size=1)
