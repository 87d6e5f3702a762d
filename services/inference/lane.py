"""One checkpoint's way: who asks joins those that are being answered, and each hears of the own reply alone."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from prometheus_client import Histogram

from services.inference.domain import Answer, Ask, Piece, Refused, Scored
from shared.telemetry import logger

BATCH_SIZE = Histogram("ratchet_inference_batch_size", "Requests in a turn", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
BATCH_SECONDS = Histogram(
    "ratchet_inference_batch_seconds",
    "Seconds a turn took: a token for each request in it",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10),
)

LONGEST_GATHER = 20  # waits; under an unbroken trickle of requests a batch starts nevertheless
T = TypeVar("T")


class GenerativeModel(Protocol):
    """A base, whose name is "", and its adapters. Methods block, and are called from one thread."""

    def add(self, name: str, directory: Path) -> None:
        """Load an adapter. Raises GiveUpError where it does not fit."""

    def remove(self, name: str) -> None:
        """Let an adapter go once nobody is answered by it."""

    def turn(self, newcomers: Sequence[tuple[int, str, Ask]]) -> list[tuple[int, Piece | Answer]]:
        """Take in (key, adapter, ask) and go on by a token; what there is to tell, each key's last an Answer.

        Where it raises, all that was taken in is lost.
        """

    def score(self, name: str, ids: Sequence[int]) -> Scored | Refused:
        """The log probabilities of given tokens."""


@dataclass(eq=False)
class _Asked:
    adapter: str
    ask: Ask
    answer: asyncio.Future[Answer]
    tell: Callable[[Piece], None] | None


class Lane:
    """A model in a thread of its own. An idle one starts when no request has come for ``wait_s``."""

    def __init__(self, model: GenerativeModel, *, batch_max: int, wait_s: float, adapters_max: int = 16) -> None:
        self.model = model
        self.batch_max, self.wait_s, self.adapters_max = batch_max, wait_s, adapters_max
        self.adapters: OrderedDict[str, str] = OrderedDict()  # the artifact's hash to its name in the model
        self.closed = False
        self._numbers = itertools.count()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._queue: deque[_Asked] = deque()
        self._open: dict[int, _Asked] = {}
        self._come = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._worker = asyncio.create_task(self._work())

    def submit(self, adapter: str, ask: Ask, tell: Callable[[Piece], None] | None = None) -> asyncio.Future[Answer]:
        """The answer to come, and before it what there is to ``tell``; who cancels it frees its row at the next token.

        Not to be called once closed.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        heard = replace(ask, streams=tell is not None, wanted=lambda: not answer.cancelled())
        self._queue.append(_Asked(adapter, heard, answer, tell))
        self._come.set()
        return answer

    async def score(self, adapter: str, ids: Sequence[int]) -> Scored | Refused:
        """Between two tokens of what is being answered. Not to be called once closed."""
        return await self._in_thread(self.model.score, adapter, ids)

    async def add(self, sha256: str, directory: Path) -> None:
        """Load an adapter. The least recently asked of more than ``adapters_max`` leaves once it has answered."""
        name = f"{sha256}-{next(self._numbers)}"  # the same one may come again while it leaves
        await self._in_thread(self.model.add, name, directory)
        self.adapters[sha256] = name
        while len(self.adapters) > self.adapters_max:
            _, oldest = self.adapters.popitem(last=False)
            retiring = asyncio.create_task(self._retire(oldest))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    def close(self) -> asyncio.Task[None]:
        """Take no more; the task ends when those who wait have been answered."""
        self.closed = True
        self._come.set()
        return self._worker

    async def _in_thread(self, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    async def _retire(self, name: str) -> None:
        if waiting := [asked.answer for asked in (*self._queue, *self._open.values()) if asked.adapter == name]:
            await asyncio.wait(waiting)
        if not self.closed:
            await self._in_thread(self.model.remove, name)

    async def _work(self) -> None:
        try:
            while self._open or await self._asked():
                await self._turn()
        finally:
            self._thread.shutdown(wait=False)

    async def _asked(self) -> bool:
        """Wait until somebody asks, and for those who come right after; False where nobody will."""
        while not self._queue:
            if self.closed:
                return False
            self._come.clear()
            await self._come.wait()
        deadline = time.monotonic() + LONGEST_GATHER * self.wait_s
        come = 0
        while come < len(self._queue) < self.batch_max and time.monotonic() <= deadline:
            come = len(self._queue)
            await asyncio.sleep(self.wait_s)
        return True

    async def _turn(self) -> None:
        newcomers = self._newcomers()
        BATCH_SIZE.observe(len(self._open))
        try:
            with BATCH_SECONDS.time():
                said = await self._in_thread(self.model.turn, newcomers)
        except Exception as error:  # out of memory and the like: those who asked are told, the lane goes on
            logger().exception("turn_failed", requests=len(self._open))
            for asked in self._open.values():
                if not asked.answer.done():
                    asked.answer.set_exception(RuntimeError(f"the model failed: {type(error).__name__}"))
            self._open.clear()
            return
        for key, news in said:
            asked = self._open[key]
            if isinstance(news, Piece):
                if asked.tell is not None:
                    asked.tell(news)
                continue
            del self._open[key]
            if not asked.answer.done():
                asked.answer.set_result(news)

    def _newcomers(self) -> list[tuple[int, str, Ask]]:
        found = []
        while self._queue and len(self._open) < self.batch_max:
            asked = self._queue.popleft()
            if not asked.answer.done():
                key = next(self._numbers)
                self._open[key] = asked
                found.append((key, asked.adapter, asked.ask))
        return found
