"""Which checkpoints are in memory, and asking them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from prometheus_client import Counter, Gauge

from services.inference.batcher import Batcher, GenerativeModel
from services.inference.domain import Answer, Ask
from shared.artifacts import ArtifactStore
from shared.errors import RetryLaterError
from shared.telemetry import logger

LOADED = Gauge("ratchet_inference_loaded_models", "Checkpoints in memory")
LOADS = Counter("ratchet_inference_loads_total", "Checkpoints read from the artifact store", ["outcome"])


class Inference:
    """The least recently asked of more than ``max_loaded`` checkpoints leaves; who waits for it is answered first."""

    def __init__(
        self,
        store: ArtifactStore,
        load: Callable[[Path], GenerativeModel],
        *,
        max_loaded: int,
        batch_max: int,
        batch_wait_s: float,
        answer_s: float = 300.0,
        waiting_max: int = 1024,
    ) -> None:
        self._store = store
        self._load = load
        self._max_loaded = max_loaded
        self._batch_max = batch_max
        self._batch_wait_s = batch_wait_s
        self._answer_s = answer_s
        self._waiting_max = waiting_max
        self._waiting = 0
        self._loading: dict[str, asyncio.Task[Batcher]] = {}
        self._loaded: OrderedDict[str, Batcher] = OrderedDict()
        self._leaving: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[str]:
        """Hashes of the checkpoints in memory, the least recently asked first."""
        return list(self._loaded)

    async def answer(self, sha256: str, ask: Ask) -> Answer:
        """Ask a checkpoint.

        Raises GiveUpError where the store has no such, intact artifact, RetryLaterError where too many wait already,
        and TimeoutError where the answer takes too long. Who is cancelled leaves the batch.
        """
        if self._waiting >= self._waiting_max:
            raise RetryLaterError(f"{self._waiting} requests wait already, as many as may; ask again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._answer_s):
                return await self._answer(sha256, ask)
        finally:
            self._waiting -= 1

    async def _answer(self, sha256: str, ask: Ask) -> Answer:
        while (batcher := self._loaded.get(sha256)) is None or batcher.closed:
            await self._ensure(sha256)
        self._loaded.move_to_end(sha256)
        return await batcher.submit(ask)

    async def _ensure(self, sha256: str) -> None:
        """Load once, however many ask at once; each of them gets the error if it fails."""
        task = self._loading.get(sha256)
        if task is None:
            task = self._loading[sha256] = asyncio.create_task(self._read(sha256))
            task.add_done_callback(lambda _: self._loading.pop(sha256, None))
        await asyncio.shield(task)

    async def _read(self, sha256: str) -> Batcher:
        try:
            directory = await asyncio.to_thread(self._store.open, sha256)
            model = await asyncio.to_thread(self._load, directory)
        except Exception:
            LOADS.labels("failed").inc()
            raise
        LOADS.labels("loaded").inc()
        batcher = Batcher(model, batch_max=self._batch_max, wait_s=self._batch_wait_s)
        self._loaded[sha256] = batcher
        while len(self._loaded) > self._max_loaded:
            _, oldest = self._loaded.popitem(last=False)
            self._leave(oldest)
        LOADED.set(len(self._loaded))
        logger().info("model_loaded", artifact=sha256, loaded=len(self._loaded))
        return batcher

    def _leave(self, batcher: Batcher) -> None:
        task = batcher.close()
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Answer who waits, then let every checkpoint go."""
        for batcher in self._loaded.values():
            self._leave(batcher)
        self._loaded.clear()
        await asyncio.gather(*self._leaving)
