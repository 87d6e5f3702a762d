"""Inbound: step events in batches, and the command that closes a window early."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from services.recorder.service import Recording
from services.recorder.windows import Closing
from shared import subjects
from shared.bus import Bus


class CloseWindow(BaseModel):
    window_id: str = Field(max_length=60)


def subscribe(
    bus: Bus, recording: Recording, closing: Closing, *, batch_size: int = 512, gather_s: float = 0.05
) -> None:
    async def close_window(request: CloseWindow) -> dict[str, Any]:
        return await closing.request_close(request.window_id)

    # Two lanes: one batch is read and written while Postgres commits the other.
    bus.consume_batches(subjects.RECORDER_STEPS, recording.take_in, batch_size=batch_size, gather_s=gather_s, lanes=2)
    bus.on_command("recorder", "close_window", CloseWindow, close_window)
