"""Calls that come within a moment, done together: one round trip and one commit for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import asyncpg

BAD_VALUE = (ValueError, asyncpg.DataError)  # nothing of what was sent with it has been done

T = TypeVar("T")
R = TypeVar("R")
Waiting = list[tuple[T, "asyncio.Future[R]"]]


class Gathered(Generic[T, R]):
    """``together`` gives a result for each of the items that came within ``within_s`` of the first, in their order.

    An item that it refuses as a bad value fails alone. What else it raises is raised to all of them.
    """

    def __init__(self, together: Callable[[list[T]], Awaitable[Sequence[R]]], within_s: float) -> None:
        self.together = together
        self.within_s = within_s
        self.waiting: Waiting[T, R] = []
        self.running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: T) -> R:
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self.waiting.append((item, answer))
        if len(self.waiting) == 1:
            task = asyncio.create_task(self._soon())
            self.running.add(task)
            task.add_done_callback(self.running.discard)
        return await answer

    async def _soon(self) -> None:
        await asyncio.sleep(self.within_s)
        waiting, self.waiting = self.waiting, []
        await self._now(waiting)

    async def _now(self, waiting: Waiting[T, R]) -> None:
        try:
            results = await self.together([item for item, _ in waiting])
        except BAD_VALUE as error:
            if len(waiting) == 1:
                _fail(waiting, error)
            else:
                for one in waiting:
                    await self._now([one])
        except Exception as error:
            _fail(waiting, error)
        else:
            for (_, answer), result in zip(waiting, results, strict=True):
                if not answer.done():  # its caller may have gone
                    answer.set_result(result)


def _fail(waiting: Waiting[T, R], error: Exception) -> None:
    for _, answer in waiting:
        if not answer.done():
            answer.set_exception(error)
