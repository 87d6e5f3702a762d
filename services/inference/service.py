"""Which checkpoints are in memory, and asking them and their adapters."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import Counter, Gauge

from services.inference.domain import Answer, Ask, Piece, Refused, Scored
from services.inference.lane import GenerativeModel, Lane
from shared.artifacts import ArtifactStore, adapter_of
from shared.errors import GiveUpError, RetryLaterError
from shared.telemetry import logger

SHA256 = re.compile("[0-9a-f]{64}")

LOADED = Gauge("ratchet_inference_loaded_models", "Checkpoints in memory")
LOADS = Counter("ratchet_inference_loads_total", "Checkpoints and adapters read from the artifact store", ["outcome"])


class Inference:
    """The least recently asked of more than ``max_loaded`` checkpoints leaves, its adapters with it.

    Who waits for it is answered first. An adapter is served over its base, which is loaded once for all of them and is
    in use when one of them is; of more than ``adapters_max`` over one base the least recently asked leaves.
    """

    def __init__(
        self,
        store: ArtifactStore,
        load: Callable[[Path], GenerativeModel],
        *,
        max_loaded: int,
        batch_max: int,
        batch_wait_s: float,
        adapters_max: int = 16,
        answer_s: float = 300.0,
        waiting_max: int = 1024,
    ) -> None:
        self._store = store
        self._load = load
        self._max_loaded = max_loaded
        self._batch_max = batch_max
        self._batch_wait_s = batch_wait_s
        self._adapters_max = adapters_max
        self._answer_s = answer_s
        self._waiting_max = waiting_max
        self._waiting = 0
        self._loading: dict[str, asyncio.Task[bool]] = {}
        self._loaded: OrderedDict[str, Lane] = OrderedDict()
        self._leaving: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[str]:
        """Hashes of the checkpoints in memory, the least recently asked first, each followed by its adapters'."""
        return [sha256 for base, lane in self._loaded.items() for sha256 in (base, *lane.adapters)]

    async def answer(self, sha256: str, ask: Ask) -> Answer:
        """Ask a version.

        Raises GiveUpError where the store has no such, intact artifact, RetryLaterError where too many wait already,
        and TimeoutError where the answer takes too long. Who is cancelled leaves the batch.
        """
        with self._one_more():
            async with asyncio.timeout(self._answer_s):
                lane, adapter = await self._found(sha256)
                return await lane.submit(adapter, ask)

    async def stream(self, sha256: str, ask: Ask) -> AsyncGenerator[Piece | Answer, None]:
        """The same piece by piece, the answer last. Raises as ``answer`` does; who closes it leaves the batch."""
        heard: asyncio.Queue[Piece | asyncio.Future[Answer]] = asyncio.Queue()
        deadline = asyncio.get_running_loop().time() + self._answer_s
        with self._one_more():
            async with asyncio.timeout_at(deadline):
                lane, adapter = await self._found(sha256)
            answer = lane.submit(adapter, ask, heard.put_nowait)
            answer.add_done_callback(heard.put_nowait)
            try:
                while True:
                    async with asyncio.timeout_at(deadline):  # of each wait: a generator has no one task to time
                        news = await heard.get()
                    if not isinstance(news, Piece):
                        yield news.result()
                        return
                    yield news
            finally:
                answer.cancel()

    async def score(self, sha256: str, ids: Sequence[int]) -> Scored | Refused:
        """How probable a version finds given tokens. Raises as ``answer`` does."""
        with self._one_more():
            async with asyncio.timeout(self._answer_s):
                lane, adapter = await self._found(sha256)
                return await lane.score(adapter, ids)

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._waiting >= self._waiting_max:
            raise RetryLaterError(f"{self._waiting} requests wait already, as many as may; ask again in a moment")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _found(self, sha256: str) -> tuple[Lane, str]:
        """The lane that serves an artifact and its adapter's name there, read where it is not in memory."""
        if not SHA256.fullmatch(sha256):
            raise GiveUpError("model must be the SHA-256 of an artifact, 64 hexadecimal digits")
        while (found := self._in_memory(sha256)) is None:
            await self._ensure(sha256)
        return found

    def _in_memory(self, sha256: str) -> tuple[Lane, str] | None:
        for base, lane in self._loaded.items():
            if base == sha256 or sha256 in lane.adapters:
                self._loaded.move_to_end(base)
                if base == sha256:
                    return lane, ""
                lane.adapters.move_to_end(sha256)
                return lane, lane.adapters[sha256]
        return None

    async def _ensure(self, sha256: str) -> bool:
        """Load once, however many ask at once; each of them gets the error if it fails. Whether it is whole weights."""
        task = self._loading.get(sha256)
        if task is None:
            task = self._loading[sha256] = asyncio.create_task(self._read(sha256))
            task.add_done_callback(lambda _: self._loading.pop(sha256, None))
        return await asyncio.shield(task)

    async def _read(self, sha256: str) -> bool:
        try:
            directory = await asyncio.to_thread(self._store.open, sha256)
            base = adapter_of(directory)
            if base is None:
                self._take(sha256, await asyncio.to_thread(self._load, directory))
            else:
                await self._read_adapter(sha256, directory, base)
        except Exception:
            LOADS.labels("failed").inc()
            raise
        LOADS.labels("loaded").inc()
        logger().info("model_loaded", artifact=sha256, adapter_of=base, loaded=len(self._loaded))
        return base is None

    async def _read_adapter(self, sha256: str, directory: Path, base: str) -> None:
        while base not in self._loaded:
            if not await self._ensure(base):
                raise GiveUpError(f"the base {base[:12]} of the adapter is an adapter itself; name whole weights")
        await self._loaded[base].add(sha256, directory)

    def _take(self, sha256: str, model: GenerativeModel) -> None:
        lane = Lane(model, batch_max=self._batch_max, wait_s=self._batch_wait_s, adapters_max=self._adapters_max)
        self._loaded[sha256] = lane
        while len(self._loaded) > self._max_loaded:
            _, oldest = self._loaded.popitem(last=False)
            self._leave(oldest)
        LOADED.set(len(self._loaded))

    def _leave(self, lane: Lane) -> None:
        task = lane.close()
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Answer who waits, then let every checkpoint go."""
        for lane in self._loaded.values():
            self._leave(lane)
        self._loaded.clear()
        await asyncio.gather(*self._leaving)
