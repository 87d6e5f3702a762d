"""The use cases of the trainer: claim a batch, train it under a lease, register the version, announce it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from prometheus_client import Counter, Histogram

from services.trainer.attempt_store import AttemptState
from services.trainer.batches import Batches
from services.trainer.child import Done, Failed, MakeEngine, Order, Refused
from services.trainer.jobs import Jobs, Written
from services.trainer.process import Died, Ended, Outcome, TrainingProcess
from services.trainer.readings import Readings
from services.trainer.store import Lease, LeaseLostError, NewModel, Store
from services.trainer.training import NothingToTrainError, Trained
from services.trainer.watch import Announcer, Watch
from shared.artifacts import ArtifactStore, adapter_of
from shared.aside import Aside
from shared.database import UNAVAILABLE, Record
from shared.errors import GiveUpError, RatchetError
from shared.events import ModelTrained
from shared.objects import Objects
from shared.telemetry import logger
from shared.trajectories import RunKey

BATCHES = Counter("ratchet_trainer_batches_total", "Batches, by what became of them", ["outcome"])
TRAIN_SECONDS = Histogram(
    "ratchet_trainer_train_seconds",
    "Seconds from lease to registered version",
    buckets=(0.2, 0.5, 1, 2, 5, 15, 60, 300, 1800, 7200),
)
HEARTBEAT_S = 2.0  # at the most: a cancelled batch is heard of by it


class Trainer:
    """One replica. Any number may run: a policy's batches are claimed once and trained under a lease."""

    def __init__(
        self,
        store: Store,
        batches: Batches,
        readings: Readings,
        jobs: Jobs,
        announcer: Announcer,
        artifacts: ArtifactStore,
        engine: MakeEngine,
        *,
        files: Callable[[], Objects],
        lease_s: float,
        tick_s: float,
        retry_s: float,
        checkpoint_s: float,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._batches = batches
        self._readings = readings
        self._jobs = jobs
        self._announcer = announcer
        self._artifacts = artifacts
        self._engine = engine
        self._lease_s = lease_s
        self._tick_s = tick_s
        self._retry_s = retry_s
        self._checkpoint_s = checkpoint_s
        self._files = files
        self._name = f"{socket.gethostname()}:{os.getpid()}"
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
        while (lease := await self._store.take(self._lease_s, self._name)) is not None:
            await self.train(lease)

    # one batch ----------------------------------------------------------------------------------
    async def train(self, lease: Lease) -> None:
        """Train a batch to its end. A failure of the world is tried again, what can never work is failed.

        An orderly stop gives the attempt back: only what crashed or failed counts.
        """
        log = logger().bind(policy=lease.policy, batch=lease.batch_id, token=lease.fencing_token)
        outcome = "retried"
        try:
            with TRAIN_SECONDS.time(), tempfile.TemporaryDirectory(prefix="ratchet-train-") as temporary:
                async with self._held(lease):
                    written = await self._jobs.write(lease)
                match await self._trained(lease, written, Path(temporary)):
                    case Done(trained):
                        async with self._held(lease):
                            await self._register(lease, written, trained, Path(temporary))
                        outcome = "trained"
                    case Refused(why, unusable):
                        outcome = await self._fail(lease, why, unusable)
                    case Failed(why, excused):
                        await self._retry(lease, why, excused=excused)
                    case Died(why):
                        await self._retry(lease, why, excused=False, state="crashed")
                    case Ended():
                        raise LeaseLostError
        except LeaseLostError:
            outcome = "lost"
            log.warning("lease_lost", action="what was trained is dropped; the batch is another's, or cancelled")
        except GiveUpError as error:
            unusable = error.skipped if isinstance(error, NothingToTrainError) else {}
            outcome = await self._fail(lease, str(error), unusable)
        except Exception as error:
            known = isinstance(error, (RatchetError, OSError, *UNAVAILABLE))
            if not known:
                log.exception("training_failed", error=str(error))
            await self._retry(lease, f"{type(error).__name__}: {error}"[:500], excused=known)
        except asyncio.CancelledError:
            with contextlib.suppress(*UNAVAILABLE):
                await self._store.release(lease)
            raise
        finally:
            BATCHES.labels(outcome).inc()
            await self._tidy(lease)

    async def _trained(self, lease: Lease, written: Written, directory: Path) -> Outcome:
        """What came of a process of its own, which is ended where the lease is lost or we are told to stop."""
        order = Order(
            lease.batch_id,
            lease.fencing_token,
            written.home,
            self._files,
            written.parent,
            directory,
            self._engine,
            self._checkpoint_s,
            base=written.base,
        )
        process = TrainingProcess(order, self._lease_s)
        watch = Watch(lease, self._announcer, asyncio.get_running_loop())
        telling = asyncio.create_task(watch.publish())
        try:
            async with self._held(lease, process, watch):
                return await asyncio.to_thread(process.run, watch.told)
        finally:
            process.end()
            watch.close()
            await telling

    @contextlib.asynccontextmanager
    async def _held(
        self, lease: Lease, process: TrainingProcess | None = None, watch: Watch | None = None
    ) -> AsyncIterator[None]:
        """The lease is prolonged meanwhile: fetching a large parent and keeping its child take longer than one, too."""
        heart = asyncio.create_task(self._heartbeat(lease, process, watch))
        try:
            yield
        finally:
            heart.cancel()

    async def _heartbeat(self, lease: Lease, process: TrainingProcess | None, watch: Watch | None) -> None:
        """Prolong the lease, and keep how far it is; a process that is no longer wanted is ended."""
        while True:
            await asyncio.sleep(min(self._lease_s / 3, HEARTBEAT_S))
            try:
                await self._store.heartbeat(lease, self._lease_s, watch.progress if watch else None)
            except LeaseLostError:
                if process is not None:
                    process.end()
                return
            except UNAVAILABLE as error:
                logger().warning("heartbeat_missed", batch=lease.batch_id, error=str(error))
            else:
                if process is not None:
                    process.held_for(self._lease_s)

    async def _fail(self, lease: Lease, why: str, unusable: Mapping[RunKey, str]) -> str:
        logger().error("batch_failed", policy=lease.policy, batch=lease.batch_id, error=why)
        await self._store.fail(lease, why, unusable)
        return "failed"

    async def _retry(self, lease: Lease, why: str, *, excused: bool, state: AttemptState = "retried") -> None:
        logger().warning("training_failed", batch=lease.batch_id, error=why, attempt=lease.attempts, state=state)
        pause_s = self._retry_s * 2 ** (lease.attempts - 1)
        await self._store.retry(lease, why, pause_s, excused=excused, state=state)

    async def _register(self, lease: Lease, written: Written, trained: Trained, directory: Path) -> None:
        head = written.head
        await self._store.heartbeat(lease, self._lease_s)  # whoever has lost it keeps no artifact either
        artifact = await asyncio.to_thread(self._artifacts.put, directory)
        number = int(head.version.removeprefix("v"))
        note = "fire drill: its weights were made worse on purpose" if head.sabotage else None
        model = NewModel(head.version, number, artifact, trained.metrics, note, adapter_of(directory))
        await self._store.finish(lease, model, trained.weights, {**written.left_out, **trained.skipped})
        log = logger().bind(policy=lease.policy, batch=lease.batch_id, version=head.version)
        if head.sabotage:
            log.warning("sabotaged", note=note)
        log.info("trained", method=head.method, runs=written.episodes, artifact=artifact.sha256)
        await self.announce_models()

    async def _tidy(self, lease: Lease) -> None:
        """The attempt's files go, and all of a batch that has ended; what cannot go now is swept later."""
        try:
            await self._jobs.clear(lease)
            await self._jobs.sweep()
        except Exception as error:
            logger().warning("files_left", batch=lease.batch_id, error=str(error))

    # announcing -----------------------------------------------------------------------------------
    async def announce_models(self) -> None:
        """Announce every version that has not been; the sweep that makes the fast path safe to lose."""
        rows = await self._store.unannounced_models()
        await self._aside.each("announce model", rows, lambda row: f"{row['policy']} {row['version']}", self._announce)

    async def _announce(self, row: Record) -> None:
        await self._announcer.announce(ModelTrained(**dict(row)))
        await self._store.model_announced(row["policy"], row["version"])

    # commands -------------------------------------------------------------------------------------
    async def cancel(self, policy: str, batch_id: str | None, by: str, reason: str | None) -> str:
        """End a batch that is being trained, wherever; its id. Its groups go back. Raises GiveUpError."""
        why = f"cancelled by {by}" + (f": {reason}" if reason else "")
        cancelled = await self._store.cancel(policy, batch_id, why)
        logger().warning("batch_cancelled", policy=policy, batch=cancelled, why=why)
        return cancelled
