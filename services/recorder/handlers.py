"""Inbound: step events in batches, and commands: close a window early, forget runs, rewrite a table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from services.recorder.retention import Forgetting
from services.recorder.service import Recording
from services.recorder.windows import Closing
from shared import subjects
from shared.bus import Bus
from shared.forgetting import ForgetRuns, RewriteTable


class CloseWindow(BaseModel):
    window_id: str = Field(max_length=60)


def subscribe_forgetting(bus: Bus, forgetting: Forgetting) -> None:
    async def forget(request: ForgetRuns) -> dict[str, Any]:
        return await forgetting.forget(request.keys, request.who, request.reason)

    async def rewrite(request: RewriteTable) -> dict[str, Any]:
        return await forgetting.rewrite(request.table)

    bus.on_command("recorder", "forget", ForgetRuns, forget)
    bus.on_command("recorder", "rewrite", RewriteTable, rewrite)


def subscribe(
    bus: Bus, recording: Recording, closing: Closing, *, batch_size: int = 1024, gather_s: float = 0.05
) -> None:
    async def close_window(request: CloseWindow) -> dict[str, Any]:
        return await closing.request_close(request.window_id)

    # Two lanes: one batch is read and written while Postgres commits the other.
    bus.consume_batches(subjects.RECORDER_STEPS, recording.take_in, batch_size=batch_size, gather_s=gather_s, lanes=2)
    bus.on_command("recorder", "close_window", CloseWindow, close_window)
