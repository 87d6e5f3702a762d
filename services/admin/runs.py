"""One run as a document: its events as stored, put together again, and what became of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from pydantic_core import from_json

from services.admin.store import Row, Store
from shared.bodies import unpacked
from shared.trajectories import Call, Stored, assemble

STEP = {"step", "environment", "provider_accesses", "action", "reward"}


async def document(store: Store, agent_id: str, trajectory_id: str) -> dict[str, Any] | None:
    """The run with every event's SHA-256 and whether the stored bytes still have it; None if there is no such run.

    ``faults``: what of it cannot be used, and why.
    """
    run = await store.run(agent_id, trajectory_id)
    if run is None:
        return None
    events = await store.run_events(agent_id, trajectory_id)
    read = [(event, content(event)) for event in events]
    bodies = [Stored(body, event["witnessed"]) for event, body in read if body is not None]
    assembled = assemble(agent_id, trajectory_id, bodies)
    return {
        "run": run,
        "events": [_event(event, body) for event, body in read],
        "steps": [step.model_dump(include=STEP) for step in assembled.steps],
        "calls": [_call(call) for call in assembled.calls],
        "faults": [asdict(fault) for fault in assembled.faults],
        "groups": await store.run_groups(agent_id, trajectory_id),
        "training": await store.run_training(agent_id, trajectory_id),
        "outcomes": await store.run_outcomes(agent_id, trajectory_id),
    }


def content(event: Row) -> bytes | None:
    """The event as its agent sent it, byte for byte; None once it was forgotten."""
    return None if event["body"] is None else unpacked(event["body"])


def _event(event: Row, body: bytes | None) -> dict[str, Any]:
    """``matches`` is None where the body was forgotten; ``event`` also where it is no JSON."""
    return {
        "event_id": str(event["event_id"]),
        "kind": event["kind"],
        "sequence": event["sequence"],
        "received_at": event["received_at"],
        "size_bytes": event["size_bytes"],
        "sha256": event["sha256"].hex(),
        "witnessed": event["witnessed"],
        "matches": None if body is None else hashlib.sha256(body).digest() == event["sha256"],
        "event": None if body is None else _parsed(body),
    }


def _parsed(body: bytes) -> Any:
    try:
        return from_json(body)
    except ValueError:
        return None


def _call(call: Call) -> dict[str, Any]:
    """A call with the whole prompt that its model was asked, written out."""
    return {
        "call_id": call.call.call_id,
        "step": call.step,
        "purpose": call.call.purpose,
        "model": call.call.model,
        "model_version": call.call.model_version,
        "witnessed": call.witnessed,
        "messages": call.messages,
        "reply": call.reply,
        "latency_ms": call.call.latency_ms,
        "usage": call.call.usage,
    }
