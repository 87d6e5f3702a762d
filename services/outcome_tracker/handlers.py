"""Inbound: facts of the world in batches, closed windows one by one; commands: fill past windows, forget runs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from ratchet_sdk.events import Instant

from services.outcome_tracker.service import Facts
from services.outcome_tracker.settling import Settling
from services.outcome_tracker.sync import Sync
from shared import subjects
from shared.bus import Bus
from shared.events import WindowClosed
from shared.forgetting import ForgetRuns, RewriteTable


class Range(BaseModel):
    starts_at: Instant = Field(alias="from")
    ends_at: Instant = Field(alias="to")


def subscribe(bus: Bus, facts: Facts, settling: Settling, sync: Sync) -> None:
    async def closed(event: WindowClosed) -> None:
        await settling.window_closed(event)

    bus.consume_batches(subjects.TRACKER_OUTCOMES, facts.take_in)
    bus.consume(subjects.TRACKER_CLOSED, WindowClosed, closed)

    async def forget(request: ForgetRuns) -> dict[str, Any]:
        return await facts.forget(request.keys)

    async def rewrite(request: RewriteTable) -> dict[str, Any]:
        return await facts.rewrite(request.table)

    async def plan(request: Range) -> dict[str, Any]:
        return await sync.plan(request.starts_at, request.ends_at)

    async def fill(request: Range) -> dict[str, Any]:
        return await sync.sync(request.starts_at, request.ends_at)

    bus.on_command("outcome_tracker", "forget", ForgetRuns, forget)
    bus.on_command("outcome_tracker", "rewrite", RewriteTable, rewrite)
    bus.on_command("outcome_tracker", "sync_plan", Range, plan)
    bus.on_command("outcome_tracker", "sync", Range, fill)
