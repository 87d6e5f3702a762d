"""What this replica saw of each version since its last report."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic_core import to_json

from shared import subjects
from shared.bus import Bus
from shared.events import GatewayHealth


@dataclass
class Tally:
    """``failures``: nobody answered, or the reply broke off. ``fallbacks``: the best version answered instead.

    ``unrecorded``: calls that named no run.
    """

    requests: int = 0
    failures: int = 0
    fallbacks: int = 0
    unrecorded: int = 0
    latency_ms_sum: float = 0.0


class Health:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._tallies: dict[tuple[str, str, str], Tally] = {}

    def of(self, policy: str, version: str, role: str) -> Tally:
        return self._tallies.setdefault((policy, version, role), Tally())

    async def report(self) -> None:
        """Publish and begin anew. Candidates come last: who judges one has then heard of the best already."""
        if not self._bus.nc.is_connected:
            return
        now = datetime.now(UTC)
        for (policy, version, role), tally in sorted(self._tallies.items(), key=lambda item: item[0][2] == "candidate"):
            health = GatewayHealth(
                gateway=self.name,
                policy=policy,
                version=version,
                requests=tally.requests,
                failures=tally.failures,
                fallbacks=tally.fallbacks,
                unrecorded=tally.unrecorded,
                latency_ms_sum=tally.latency_ms_sum,
                at=now,
            )
            del self._tallies[policy, version, role]
            await self._bus.nc.publish(subjects.GATEWAY_HEALTH, to_json(health.model_dump(mode="json")))
