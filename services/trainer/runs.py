"""Runs from Postgres, and the Protocol by which readings and training ask for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from shared.database import UNAVAILABLE, Pool
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory, load

RUNS_AT_ONCE = 64


class Runs(Protocol):
    async def load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        """Stored runs by key, put together from their events; what was forgotten is absent."""

    def chunks(self, keys: Sequence[RunKey]) -> AsyncIterator[dict[RunKey, Trajectory]]:
        """The same some at a time, in the order of ``keys``: whoever drops each holds no more than a few."""


class StoredRuns:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        found: dict[RunKey, Trajectory] = {}
        async for chunk in self.chunks(keys):
            found |= chunk
        return found

    async def chunks(self, keys: Sequence[RunKey]) -> AsyncIterator[dict[RunKey, Trajectory]]:
        for start in range(0, len(keys), RUNS_AT_ONCE):  # parsing is work: heartbeats get a turn in between
            yield await self._load(keys[start : start + RUNS_AT_ONCE])

    async def _load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        """A run whose stored bytes cannot be unpacked is absent, and takes no other with it."""
        try:
            return await load(self._pool, keys)
        except UNAVAILABLE:
            raise
        except Exception as error:
            if len(keys) == 1:
                logger().exception("run_not_loaded", agent=keys[0][0], trajectory=keys[0][1], error=str(error))
                return {}
            return {key: run for one in keys for key, run in (await self._load([one])).items()}
