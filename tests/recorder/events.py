"""Events and deliveries as the recorder meets them."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from ratchet_sdk.events import LlmCall, LlmCallMade, Step, StepEvent, TrajectoryEnded, TrajectoryStarted

from services.recorder import envelope
from services.recorder.domain import Received
from shared.bodies import packed
from shared.delivery import Delivery

START = datetime(2026, 11, 20, 10, 0, 1, tzinfo=UTC)
WINDOW_S = 60
WINDOW_ID = "2026-11-20T10:00~60s"


def head(trajectory_id: str = "t", second: float = 0, **more: Any) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory_id,
        "started_at": START,
        "occurred_at": START + timedelta(seconds=second),
        **more,
    }


def started(trajectory_id: str = "t", **more: Any) -> TrajectoryStarted:
    return TrajectoryStarted(**{**head(trajectory_id), **more})


def step(number: int = 0, trajectory_id: str = "t", **more: Any) -> Step:
    return Step(**{**head(trajectory_id, number + 1), "step": number, **more})


def call_made(call_id: str, trajectory_id: str = "t", number: int = 0, **more: Any) -> LlmCallMade:
    call = LlmCall(call_id=call_id, **more)
    return LlmCallMade(**head(trajectory_id, number + 0.5), step=number, call=call)


def ended(trajectory_id: str = "t", **more: Any) -> TrajectoryEnded:
    return TrajectoryEnded(**{**head(trajectory_id, 9), "status": "completed", "step_count": 1, **more})


def reply(text: str = "ok", **more: Any) -> dict[str, Any]:
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": text}, **more}


def encoded(event: StepEvent) -> bytes:
    return event.model_dump_json(by_alias=True, exclude_none=True).encode()


def delivery(data: bytes, sequence: int = 1, subject: str = "steps.a", **headers: str) -> Delivery:
    return Delivery(subject, data, {k.replace("_", "-"): v for k, v in headers.items()}, sequence, START, 1)


def received(event: StepEvent, sequence: int, agent_id: str = "a", published_at: datetime = START) -> Received:
    data, read = encoded(event), envelope.of(event)
    return Received(agent_id, read, sequence, published_at, hashlib.sha256(data).digest(), len(data), packed(data))


def numbered(*events: StepEvent, first: int = 1) -> list[Received]:
    return [received(event, first + place) for place, event in enumerate(events)]
