"""Runs from Postgres, for the Protocol that the batches and the training need."""

from __future__ import annotations

from collections.abc import Sequence

from shared.database import Pool
from shared.trajectories import RunKey, Trajectory, load


class StoredRuns:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        return await load(self._pool, keys) if keys else {}
