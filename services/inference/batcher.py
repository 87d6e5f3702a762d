"""Requests that come together are answered together: one worker a model, one forward pass for all who wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from prometheus_client import Histogram

from services.inference.domain import Answer, Ask
from shared.telemetry import logger

BATCH_SIZE = Histogram(
    "ratchet_inference_batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
BATCH_SECONDS = Histogram("ratchet_inference_batch_seconds", "Seconds a batch took in the model")

LONGEST_GATHER = 20  # waits; under an unbroken trickle of requests a batch starts nevertheless


class GenerativeModel(Protocol):
    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer each, in order. Blocks; called from one thread at a time."""


class Batcher:
    """Gathers until no request has come for ``wait_s`` or ``batch_max`` are there, then answers in a thread."""

    def __init__(self, model: GenerativeModel, *, batch_max: int, wait_s: float) -> None:
        self.model = model
        self.batch_max, self.wait_s = batch_max, wait_s
        self.closed = False
        self._queue: asyncio.Queue[tuple[Ask, asyncio.Future[Answer]] | None] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    def submit(self, ask: Ask) -> asyncio.Future[Answer]:
        """The answer to come; who cancels it frees its place in the batch. Not to be called once closed."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((replace(ask, wanted=lambda: not future.cancelled()), future))
        return future

    def close(self) -> asyncio.Task[None]:
        """Take no more; the task ends when those who wait have been answered."""
        if not self.closed:
            self.closed = True
            self._queue.put_nowait(None)
        return self._worker

    async def _work(self) -> None:
        while True:
            first = await self._queue.get()
            if first is None:
                return
            batch, last = await self._gather(first)
            await self._answer(batch)
            if last:
                return

    async def _gather(
        self, first: tuple[Ask, asyncio.Future[Answer]]
    ) -> tuple[list[tuple[Ask, asyncio.Future[Answer]]], bool]:
        batch = [first]
        deadline = time.monotonic() + LONGEST_GATHER * self.wait_s
        while len(batch) < self.batch_max:
            if self._queue.empty():
                if time.monotonic() >= deadline:
                    break
                await asyncio.sleep(self.wait_s)
                if self._queue.empty():
                    break
            item = self._queue.get_nowait()
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    async def _answer(self, batch: list[tuple[Ask, asyncio.Future[Answer]]]) -> None:
        batch = [(ask, future) for ask, future in batch if not future.cancelled()]
        if not batch:
            return
        BATCH_SIZE.observe(len(batch))
        try:
            with BATCH_SECONDS.time():
                answers = await asyncio.to_thread(self.model.answer, [ask for ask, _ in batch])
        except Exception as error:  # out of memory and the like: those who asked are told, the worker goes on
            logger().exception("batch_failed", size=len(batch))
            for _, future in batch:
                if not future.done():
                    future.set_exception(RuntimeError(f"the model failed: {type(error).__name__}"))
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
