"""The use cases of the trainer: claim a batch, train it under a lease, register the version, announce it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol

from prometheus_client import Counter, Histogram

from services.trainer.batches import Batches
from services.trainer.domain import next_version
from services.trainer.readings import Readings
from services.trainer.records import records_of
from services.trainer.runs import Runs
from services.trainer.store import Lease, LeaseLostError, NewModel, Store
from services.trainer.training import (
    Engine,
    Episode,
    Job,
    NothingToTrainError,
    Progress,
    Recipe,
    Trained,
    TrainingStoppedError,
)
from shared.artifacts import Artifact, ArtifactStore, base_of, describe
from shared.aside import Aside
from shared.database import UNAVAILABLE, Record
from shared.errors import GiveUpError, RatchetError
from shared.events import LoopEvent, ModelTrained, TrainingProgress
from shared.telemetry import logger
from shared.trajectories import RunKey

BATCHES = Counter("ratchet_trainer_batches_total", "Batches, by what became of them", ["outcome"])
TRAIN_SECONDS = Histogram(
    "ratchet_trainer_train_seconds",
    "Seconds from lease to registered version",
    buckets=(0.2, 0.5, 1, 2, 5, 15, 60, 300, 1800, 7200),
)
PROGRESS_EVENTS = 50


class Announcer(Protocol):
    async def announce(self, event: LoopEvent) -> None: ...


class Trainer:
    """One replica. Any number may run: a policy's batches are claimed once and trained under a lease."""

    def __init__(
        self,
        store: Store,
        batches: Batches,
        readings: Readings,
        runs: Runs,
        announcer: Announcer,
        artifacts: ArtifactStore,
        engine: Engine,
        *,
        lease_s: float,
        tick_s: float,
        retry_s: float,
        sabotage_version: int | None = None,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._batches = batches
        self._readings = readings
        self._runs = runs
        self._announcer = announcer
        self._artifacts = artifacts
        self._engine = engine
        self._lease_s = lease_s
        self._tick_s = tick_s
        self._retry_s = retry_s
        self._sabotage_version = sabotage_version
        self._woken = asyncio.Event()
        self._aside = aside or Aside("trainer")

    # the round ----------------------------------------------------------------------------------
    def wake(self) -> None:
        """Something may be ready: look now instead of at the next tick."""
        self._woken.set()

    async def tick(self) -> None:
        """Wait until woken or until the tick, then do one round."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._tick_s):  # wait_for can swallow a cancellation that meets its timeout
                await self._woken.wait()
        self._woken.clear()
        await self.round()

    async def round(self) -> None:
        """Claim what is ready, then train every batch that nobody holds."""
        for batch_id in await self._store.give_up_on_exhausted():
            BATCHES.labels("given_up").inc()
            logger().error("batch_given_up", batch=batch_id)
        await self._readings.sweep()
        await self._batches.claim_ready()
        while (lease := await self._store.take(self._lease_s)) is not None:
            await self.train(lease)

    # one batch ----------------------------------------------------------------------------------
    async def train(self, lease: Lease) -> None:
        """Train a batch to its end. A failure of the world is tried again, what can never work is failed.

        An orderly stop gives the attempt back: only what crashed or failed counts.
        """
        stop = threading.Event()
        log = logger().bind(policy=lease.policy, batch=lease.batch_id, token=lease.fencing_token)
        heart = asyncio.create_task(self._heartbeat(lease, stop))
        outcome = "retried"
        try:
            with TRAIN_SECONDS.time(), tempfile.TemporaryDirectory(prefix="ratchet-train-") as temporary:
                job, forgotten = await self._job(lease)
                async with self._progress(lease, stop) as progress:
                    trained = await asyncio.to_thread(self._engine.train, job, Path(temporary), progress)
                await self._register(lease, job, trained, forgotten, Path(temporary))
            outcome = "trained"
        except (LeaseLostError, TrainingStoppedError):
            outcome = "lost"
            log.warning("lease_lost", action="what was trained is dropped; the batch is another's")
        except GiveUpError as error:
            outcome = "failed"
            log.error("batch_failed", error=str(error))
            unusable = error.skipped if isinstance(error, NothingToTrainError) else {}
            await self._store.fail(lease, str(error), unusable)
        except Exception as error:
            known = isinstance(error, (RatchetError, OSError, *UNAVAILABLE))
            (log.warning if known else log.exception)("training_failed", error=str(error), attempt=lease.attempts)
            pause_s = self._retry_s * 2 ** (lease.attempts - 1)
            await self._store.retry(lease, f"{type(error).__name__}: {error}"[:500], pause_s, excused=known)
        except asyncio.CancelledError:
            stop.set()
            with contextlib.suppress(*UNAVAILABLE):
                await self._store.release(lease)
            raise
        finally:
            heart.cancel()
            BATCHES.labels(outcome).inc()

    async def _heartbeat(self, lease: Lease, stop: threading.Event) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._store.heartbeat(lease, self._lease_s)
            except LeaseLostError:
                stop.set()
                return
            except UNAVAILABLE as error:
                logger().warning("heartbeat_missed", batch=lease.batch_id, error=str(error))

    @contextlib.asynccontextmanager
    async def _progress(self, lease: Lease, stop: threading.Event) -> AsyncIterator[Progress]:
        """A callback for the engine's thread; what it is told is published without holding the training up."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[TrainingProgress | None] = asyncio.Queue()

        def progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
            if stop.is_set():
                raise TrainingStoppedError
            every = -(-steps // PROGRESS_EVENTS)
            if metrics and (step % every == 0 or step == steps):
                event = TrainingProgress(
                    policy=lease.policy,
                    batch_id=lease.batch_id,
                    fencing_token=lease.fencing_token,
                    step=step,
                    steps=steps,
                    metrics=dict(metrics),
                )
                loop.call_soon_threadsafe(queue.put_nowait, event)

        publishing = asyncio.create_task(self._publish_progress(queue))
        try:
            yield progress
        finally:
            queue.put_nowait(None)
            await publishing

    async def _publish_progress(self, queue: asyncio.Queue[TrainingProgress | None]) -> None:
        while (event := await queue.get()) is not None:
            try:
                await self._announcer.announce(event)
            except RatchetError as error:
                logger().warning("progress_not_published", batch=event.batch_id, error=str(error))

    async def _job(self, lease: Lease) -> tuple[Job, dict[RunKey, str]]:
        """What the engine gets, and the runs of the batch whose events are gone."""
        members = await self._store.members(lease.batch_id)
        keys = [(row["agent_id"], row["trajectory_id"]) for row in members]
        loaded = await self._runs.load(keys)
        episodes = [
            Episode(**dict(row), calls=records_of(run))
            for row in members
            if (run := loaded.get((row["agent_id"], row["trajectory_id"]))) is not None
        ]
        forgotten = {key: "its events are no longer stored" for key in keys if key not in loaded}
        if not episodes:
            raise NothingToTrainError(
                f"no run of batch {lease.batch_id} is stored any more; its bodies were forgotten", forgotten
            )
        sha256 = await self._store.artifact_of(lease.policy, lease.parent_version)
        parent = await asyncio.to_thread(self._artifacts.open, sha256)
        number = await self._store.next_number(lease.policy)
        job = Job(
            lease.batch_id,
            lease.policy,
            next_version(number),
            lease.parent_version,
            lease.method,
            parent,
            tuple(episodes),
            Recipe(**lease.config["recipe"]),
            sabotage=number == self._sabotage_version,
            base=await asyncio.to_thread(base_of, self._artifacts, parent),
        )
        return job, forgotten

    async def _register(
        self, lease: Lease, job: Job, trained: Trained, forgotten: dict[RunKey, str], directory: Path
    ) -> None:
        artifact = await asyncio.to_thread(self._artifacts.put, directory)
        number = int(job.version.removeprefix("v"))
        note = "fire drill: its weights were made worse on purpose" if job.sabotage else None
        model = NewModel(job.version, number, artifact, trained.metrics, note)
        await self._store.finish(lease, model, trained.weights, {**forgotten, **trained.skipped})
        log = logger().bind(policy=lease.policy, batch=lease.batch_id, version=job.version)
        if job.sabotage:
            log.warning("sabotaged", note=note)
        log.info("trained", method=job.method, runs=len(job.episodes), artifact=artifact.sha256)
        await self.announce_models()

    # announcing -----------------------------------------------------------------------------------
    async def announce_models(self) -> None:
        """Announce every version that has not been; the sweep that makes the fast path safe to lose."""
        rows = await self._store.unannounced_models()
        await self._aside.each("announce model", rows, lambda row: f"{row['policy']} {row['version']}", self._announce)

    async def _announce(self, row: Record) -> None:
        await self._announcer.announce(ModelTrained(**dict(row)))
        await self._store.model_announced(row["policy"], row["version"])

    # commands -------------------------------------------------------------------------------------
    async def register_base(self, policy: str, artifact_sha256: str, note: str | None) -> str:
        """Make an artifact of the store a policy's v0, and announce it. Twice is once."""
        directory = await asyncio.to_thread(self._artifacts.open, artifact_sha256)
        artifact: Artifact = await asyncio.to_thread(describe, directory)
        await self._store.register_base(policy, artifact, note)
        await self.announce_models()
        return next_version(0)
