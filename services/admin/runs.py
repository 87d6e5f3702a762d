"""One run as a document: its events as stored, put together again, and what became of it."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic_core import from_json

from services.admin.store import Row, Store
from shared.bodies import unpacked
from shared.trajectories import Trajectory, assemble


async def document(store: Store, agent_id: str, trajectory_id: str) -> dict[str, Any] | None:
    """The run with every event's SHA-256 and whether the stored bytes still have it; None if there is no such run."""
    run = await store.run(agent_id, trajectory_id)
    if run is None:
        return None
    events = await store.run_events(agent_id, trajectory_id)
    bodies = [body for event in events if (body := content(event)) is not None]
    assembled = assemble(agent_id, trajectory_id, bodies)
    return {
        "run": run,
        "events": [_event(event) for event in events],
        "calls": [_call(assembled, n) for n in range(len(assembled.calls))],
        "groups": await store.run_groups(agent_id, trajectory_id),
        "training": await store.run_training(agent_id, trajectory_id),
        "outcomes": await store.run_outcomes(agent_id, trajectory_id),
    }


def content(event: Row) -> bytes | None:
    """The event as its agent sent it, byte for byte; None once it was forgotten."""
    return None if event["body"] is None else unpacked(event["body"])


def _event(event: Row) -> dict[str, Any]:
    body = content(event)
    return {
        "event_id": str(event["event_id"]),
        "kind": event["kind"],
        "sequence": event["sequence"],
        "received_at": event["received_at"],
        "size_bytes": event["size_bytes"],
        "sha256": event["sha256"].hex(),
        "matches": None if body is None else hashlib.sha256(body).digest() == event["sha256"],
        "event": None if body is None else from_json(body),
    }


def _call(assembled: Trajectory, n: int) -> dict[str, Any]:
    """A call with the whole prompt that its model was asked, written out."""
    call = assembled.calls[n]
    return {
        "call_id": call.call.call_id,
        "step": call.step,
        "purpose": call.call.purpose,
        "model": call.call.model,
        "model_version": call.call.model_version,
        "messages": call.messages,
        "reply": call.reply,
        "latency_ms": call.call.latency_ms,
        "usage": call.call.usage,
    }
