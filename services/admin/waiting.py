"""What waits longer than it may, as a metric: whoever is to move it cannot always say so itself."""

from __future__ import annotations

from prometheus_client import Gauge

from services.admin.domain import overdue
from services.admin.store import Store

OVERDUE = Gauge("ratchet_wait_overdue", "Things in the loop that wait longer than they may, by what they are", ["kind"])
MEASURE_S = 15.0


class Waiting:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def measure(self) -> None:
        for kind, count in overdue(await self._store.waits()).items():
            OVERDUE.labels(kind).set(count)
