"""A batch made into a job: its runs are read some at a time, and written where whoever trains it reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.domain import next_version
from services.trainer.job_files import Head, JobWriter
from services.trainer.records import records_of
from services.trainer.runs import Runs
from services.trainer.store import Lease, Store
from services.trainer.training import Episode, NothingToTrainError, Recipe
from shared.artifacts import ArtifactStore, base_of
from shared.database import Record
from shared.objects import Objects
from shared.trajectories import RunKey, Trajectory

RUNS_AT_ONCE = 64
JOBS, CHECKPOINTS = "jobs", "checkpoints"


@dataclass(frozen=True)
class Written:
    """A job below ``home``. ``left_out``: runs of the batch that it lacks, each with the reason."""

    home: str
    head: Head
    parent: Path
    base: Path | None  # of a parent that is an adapter
    episodes: int
    left_out: dict[RunKey, str]


class Jobs:
    def __init__(
        self, store: Store, runs: Runs, artifacts: ArtifactStore, objects: Objects, sabotage_version: int | None
    ) -> None:
        self._store, self._runs = store, runs
        self._artifacts, self._objects = artifacts, objects
        self._sabotage_version = sabotage_version

    async def write(self, lease: Lease) -> Written:
        """The job of one attempt. Raises NothingToTrainError where no run of the batch is stored any more."""
        home = f"{JOBS}/{lease.batch_id}/{lease.fencing_token}"
        writer = JobWriter(self._objects, home)
        members = await self._store.members(lease.batch_id)
        left_out: dict[RunKey, str] = {}
        for start in range(0, len(members), RUNS_AT_ONCE):
            some = members[start : start + RUNS_AT_ONCE]
            loaded = await self._runs.load([_key(row) for row in some])
            left_out |= await asyncio.to_thread(_add, writer, some, loaded)
        if not writer.episodes:
            raise NothingToTrainError(f"no run of batch {lease.batch_id} is stored any more", left_out)
        sha256 = await self._store.weights_of(lease.batch_id)
        parent = await asyncio.to_thread(self._artifacts.open, sha256)
        base = await asyncio.to_thread(base_of, self._artifacts, parent)
        number = await self._store.next_number(lease.policy)
        head = Head(
            lease.batch_id,
            lease.policy,
            next_version(number),
            lease.parent_version,
            lease.method,
            sha256,
            Recipe(**lease.config["recipe"]),
            sabotage=number == self._sabotage_version,
        )
        await asyncio.to_thread(writer.close, head)
        return Written(home, head, parent, base, writer.episodes, left_out)

    async def clear(self, lease: Lease) -> None:
        """Let go of an attempt's files: they hold what agents said."""
        await asyncio.to_thread(self._objects.remove, f"{JOBS}/{lease.batch_id}/{lease.fencing_token}")

    async def sweep(self) -> None:
        """Let go of what nobody will ask for: files of batches that ended, and of attempts that others followed."""
        names = await asyncio.to_thread(lambda: [n for root in (JOBS, CHECKPOINTS) for n in self._objects.names(root)])
        found = {tuple(name.split("/")[:3]) for name in names}
        running = await self._store.running_attempts(sorted({batch_id for _, batch_id, _ in found}))
        for root, batch_id, part in sorted(found):
            current = running.get(batch_id)
            if current is None or (root == JOBS and int(part) < current):
                await asyncio.to_thread(self._objects.remove, f"{root}/{batch_id}/{part}")


def _key(row: Record) -> RunKey:
    return (row["agent_id"], row["trajectory_id"])


def _add(writer: JobWriter, members: Sequence[Record], loaded: dict[RunKey, Trajectory]) -> dict[RunKey, str]:
    """The members whose runs are there, written; of the others why they are not."""
    left_out = {}
    for row in members:
        run = loaded.get(_key(row))
        if run is None:
            left_out[_key(row)] = "its events are no longer stored"
            continue
        try:
            writer.add(Episode(**dict(row), calls=records_of(run)))
        except ValueError as error:  # an integer of thousands of digits
            left_out[_key(row)] = f"it cannot be written as JSON: {error}"[:300]
    return left_out
