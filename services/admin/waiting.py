"""What waits, and what waits longer than it may: read from time to time, for it takes as long as the history is."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import Gauge

from services.admin.domain import overdue
from services.admin.store import Row, Store

OVERDUE = Gauge("ratchet_wait_overdue", "Things in the loop that wait longer than they may, by what they are", ["kind"])
MEASURE_S = 15.0


class Waiting:
    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._rows: list[Row] = []
        self._read_at: float | None = None

    async def measure(self) -> None:
        self._rows = await self._store.waits()
        self._read_at = self._clock()
        for kind, count in overdue(self._rows).items():
            OVERDUE.labels(kind).set(count)

    async def rows(self) -> list[Row]:
        """As they were seconds ago, what is overdue first."""
        if self._read_at is None or self._clock() - self._read_at > 2 * MEASURE_S:
            await self.measure()
        return self._rows
