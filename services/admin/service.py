"""What the operators' page and the command line show: read together, and asked of the services."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from services.admin.domain import Lag, service_of, shares, verdict
from services.admin.store import Row, Store
from shared import subjects
from shared.bus import Bus
from shared.errors import RatchetError
from shared.routing import RouteDocument

READINESS_TIMEOUT_S = 3.0


async def consumers(bus: Bus) -> list[dict[str, Any]]:
    """Every durable consumer with its lag and a verdict."""
    lags = await asyncio.gather(*(lag_of(bus, consumer) for consumer in subjects.CONSUMERS))
    return [{**asdict(lag), "service": service_of(lag.consumer), "verdict": verdict(lag)} for lag in lags]


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


async def overview(store: Store, bus: Bus) -> dict[str, Any]:
    """What the front page shows."""
    policies = await store.policies()
    ready, lags = await asyncio.gather(asyncio.gather(*(readiness(bus, policy) for policy in policies)), consumers(bus))
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
        "consumers": lags,
    }


async def lag_of(bus: Bus, consumer: subjects.Consumer) -> Lag:
    try:
        info = await bus.js.consumer_info(consumer.stream, consumer.durable, timeout=3)
    except NotFoundError:
        return Lag(consumer.durable, consumer.stream, 0, 0, 0, 0, "it does not exist; run `ratchet migrate`")
    except (NatsError, OSError, TimeoutError) as error:
        return Lag(consumer.durable, consumer.stream, 0, 0, 0, 0, f"JetStream did not answer: {error!r}")
    return Lag(
        consumer.durable,
        consumer.stream,
        info.num_pending or 0,
        info.num_ack_pending or 0,
        info.num_redelivered or 0,
        info.num_waiting or 0,
    )
