"""Inbound: resolved windows, one at a time, for each may ask a judge many things; and an operator's commands."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from services.scorer.probes.probing import Prober
from services.scorer.service import Scorer
from shared import subjects
from shared.bus import Bus
from shared.events import WindowResolved
from shared.forgetting import ForgetRuns, RewriteTable

ShortText = Annotated[str, Field(min_length=1, max_length=200)]


class Rescore(BaseModel):
    window_id: ShortText
    judge: ShortText | None = None
    rubric: ShortText | None = None


class Probe(BaseModel):
    who: ShortText = "operator"


class Release(Probe):
    reason: Annotated[str, Field(min_length=1, max_length=1000)]


class JudgeTold(BaseModel):
    """Which judge runs here, and whether it can be reached."""


def subscribe_judge(bus: Bus, told: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    async def judge(_: JudgeTold) -> dict[str, Any]:
        return await told()

    bus.on_command("scorer", "judge", JudgeTold, judge)


def subscribe(bus: Bus, service: Scorer) -> None:
    async def resolved(event: WindowResolved) -> None:
        await service.window_resolved(event)

    async def forget(request: ForgetRuns) -> dict[str, Any]:
        return await service.forget(request.keys)

    async def rewrite(request: RewriteTable) -> dict[str, Any]:
        return await service.rewrite(request.table)

    bus.on_command("scorer", "forget", ForgetRuns, forget)
    bus.on_command("scorer", "rewrite", RewriteTable, rewrite)

    async def rescore(request: Rescore) -> dict[str, Any]:
        count = await service.rescore(request.window_id, request.judge, request.rubric)
        return {"window_id": request.window_id, "groups": count}

    bus.consume(subjects.SCORER_RESOLVED, WindowResolved, resolved, batch_size=1)
    bus.on_command("scorer", "rescore", Rescore, rescore)


def subscribe_prober(bus: Bus, prober: Prober) -> None:
    async def probe(request: Probe) -> dict[str, Any]:
        return {"probe_id": await prober.probe_now(request.who)}

    async def release(request: Release) -> dict[str, Any]:
        return {"probe_id": await prober.release(request.who, request.reason)}

    bus.on_command("scorer", "probe", Probe, probe)
    bus.on_command("scorer", "release", Release, release)
