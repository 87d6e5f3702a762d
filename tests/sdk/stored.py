"""What lies in the stream of steps, read back."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

from ratchet_sdk.events import StepEvent, step_events

from shared.bus import Bus


@dataclass(frozen=True)
class Stored:
    subject: str
    headers: dict[str, str]
    data: bytes

    @property
    def event(self) -> StepEvent:
        packed = self.headers.get("Content-Encoding") == "gzip"
        return step_events.validate_json(gzip.decompress(self.data) if packed else self.data)


async def stored(bus: Bus) -> list[Stored]:
    info = await bus.js.stream_info("STEPS")
    found = []
    for sequence in range(1, info.state.last_seq + 1):
        message = await bus.js.get_msg("STEPS", sequence)
        found.append(Stored(message.subject or "", dict(message.headers or {}), message.data or b""))
    return found
