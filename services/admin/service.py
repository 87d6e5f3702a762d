"""What the operators' page and the command line show: read together, and asked of the services."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from services.admin.domain import down, shares
from services.admin.store import Row, Store
from services.admin.waiting import Waiting
from services.admin.watch import Watch
from shared.bus import Bus
from shared.errors import RatchetError
from shared.routing import RouteDocument

READINESS_TIMEOUT_S = 3.0


async def readiness(bus: Bus, policy: str) -> dict[str, Any]:
    """What the trainer says of a policy; ``ready`` is None and ``fault`` says why where it said nothing."""
    try:
        answer = await bus.command("trainer", "readiness", {"policy": policy}, timeout_s=READINESS_TIMEOUT_S)
    except RatchetError as error:
        return unknown_readiness(policy, error)
    return {"policy": policy, **answer}


def unknown_readiness(policy: str, why: RatchetError) -> dict[str, Any]:
    return {"policy": policy, "ready": None, "missing": [], "fault": str(why)}


async def models(store: Store, policy: str | None = None) -> list[Row]:
    """Versions with the share of runs that their policy's route gives them now."""
    now = datetime.now(UTC)
    current: dict[str, dict[str, float]] = {}
    for row in await store.routes():
        try:
            current[row["policy"]] = shares(RouteDocument.model_validate(row["document"]), now)
        except ValidationError:  # a document of another release: its shares are unknown, the page still comes
            continue
    found = await store.models(policy)
    return [{**row, "share": current.get(row["policy"], {}).get(row["version"], 0.0)} for row in found]


async def overview(store: Store, bus: Bus, watch: Watch, waiting: Waiting) -> dict[str, Any]:
    """What the front page shows."""
    policies = await store.policies()
    ready, _ = await asyncio.gather(asyncio.gather(*(readiness(bus, policy) for policy in policies)), watch.fresh())
    services = watch.services()
    return {
        "at": datetime.now(UTC),
        "policies": policies,
        "readiness": ready,
        "windows": await store.windows(12),
        "models": await models(store),
        "batches": await store.batches(8),
        "incidents": await store.incidents(8),
        "unrecorded": await store.gateway_keys.unrecorded(),
        "rewards": {policy: await store.rewards_by_window(policy) for policy in policies},
        "services": [asdict(one) for one in services],
        "down": [asdict(one) for one in down(services)],
        "consumers": watch.consumers(),
        "waits": await waiting.rows(),
    }
