"""Runs from Postgres, for the Protocol that the batches and the training need."""

from __future__ import annotations

from collections.abc import Sequence

from shared.database import Pool
from shared.trajectories import RunKey, Trajectory, load

RUNS_AT_ONCE = 64


class StoredRuns:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        found: dict[RunKey, Trajectory] = {}
        for start in range(0, len(keys), RUNS_AT_ONCE):  # parsing is work: heartbeats get a turn in between
            found |= await load(self._pool, keys[start : start + RUNS_AT_ONCE])
        return found
