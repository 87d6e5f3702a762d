"""How far a training is: kept for the next heartbeat, and published without holding the training up."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from services.trainer.child import Step
from services.trainer.store import Lease
from shared.errors import RatchetError
from shared.events import LoopEvent, TrainingProgress
from shared.telemetry import logger

PROGRESS_EVENTS = 50


class Announcer(Protocol):
    async def announce(self, event: LoopEvent) -> None: ...


class Watch:
    """Of one attempt. ``progress`` is the last step with its metrics, or None before the first."""

    def __init__(self, lease: Lease, announcer: Announcer, loop: asyncio.AbstractEventLoop) -> None:
        self._lease, self._announcer, self._loop = lease, announcer, loop
        self._queue: asyncio.Queue[TrainingProgress | None] = asyncio.Queue()
        self.progress: dict[str, Any] | None = None

    def told(self, told: Step) -> None:
        """For the thread that listens to the process."""
        self._loop.call_soon_threadsafe(self._take, told)

    def _take(self, told: Step) -> None:
        self.progress = {"step": told.step, "steps": told.steps, **told.metrics}
        every = -(-told.steps // PROGRESS_EVENTS)
        if told.step % every == 0 or told.step == told.steps:
            self._queue.put_nowait(
                TrainingProgress(
                    policy=self._lease.policy,
                    batch_id=self._lease.batch_id,
                    fencing_token=self._lease.fencing_token,
                    step=told.step,
                    steps=told.steps,
                    metrics=dict(told.metrics),
                )
            )

    def close(self) -> None:
        """No more is told; ``publish`` ends once it has said what there is."""
        self._queue.put_nowait(None)

    async def publish(self) -> None:
        while (event := await self._queue.get()) is not None:
            try:
                await self._announcer.announce(event)
            except RatchetError as error:
                logger().warning("progress_not_published", batch=event.batch_id, error=str(error))
