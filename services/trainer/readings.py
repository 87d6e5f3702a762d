"""What each judged run can carry, read from its bodies once and kept, so that readiness and plans read none."""

from __future__ import annotations

from prometheus_client import Counter

from services.trainer.group_store import GroupStore
from services.trainer.reading_domain import UNSTORED, Reading, reading, unreadable
from services.trainer.records import records_of
from services.trainer.runs import RUNS_AT_ONCE, Runs
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory

READ = Counter("ratchet_trainer_runs_read_total", "Judged runs, by what each can carry at best", ["carries"])


class Readings:
    def __init__(self, store: GroupStore, runs: Runs) -> None:
        self._store = store
        self._runs = runs

    async def sweep(self) -> int:
        """Read what was judged and not read yet; how many runs that were. Done twice it is done once."""
        count = 0
        while keys := await self._store.unread(RUNS_AT_ONCE):
            loaded = await self._runs.load(keys)
            found = {key: _read(key, loaded.get(key)) for key in keys}
            await self._store.keep_readings(found)
            for one in found.values():
                READ.labels(one.kind).inc()
            count += len(keys)
        return count


def _read(key: RunKey, run: Trajectory | None) -> Reading:
    if run is None:
        return unreadable(UNSTORED)
    try:
        return reading(records_of(run))
    except Exception as error:  # one run that no reader foresaw stops neither its neighbours nor other policies
        logger().exception("run_not_read", agent=key[0], trajectory=key[1])
        return unreadable(f"it cannot be read: {type(error).__name__}")
