"""A run put together again from its stored events, as the agent sent them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ratchet_sdk.events import (
    LlmCall,
    LlmCallMade,
    Step,
    StepEvent,
    TrajectoryEnded,
    TrajectoryStarted,
    step_events,
)

from shared.bodies import unpacked
from shared.database import Pool
from shared.errors import GiveUpError

RunKey = tuple[str, str]


@dataclass(frozen=True)
class Call:
    """One model call with its prompt written out: ``messages`` is what the model was really asked."""

    call: LlmCall
    step: int
    messages: list[dict[str, Any]]
    occurred_at: datetime

    @property
    def reply(self) -> dict[str, Any] | None:
        """The assistant message that came back, or None where the reply was not recorded."""
        return (self.call.response or {}).get("message")


@dataclass(frozen=True)
class Trajectory:
    agent_id: str
    trajectory_id: str
    started: TrajectoryStarted | None
    steps: list[Step]
    calls: list[Call]
    ended: TrajectoryEnded | None
    raw: list[bytes] = field(default_factory=list, repr=False)

    @property
    def key(self) -> RunKey:
        return (self.agent_id, self.trajectory_id)


def merge_calls(events: Sequence[StepEvent]) -> list[tuple[LlmCall, int, datetime]]:
    """Each call once with its step, by time of the event that brought it, then by its place in that event.

    The first that has the reply is the content. One that only refers to it adds what it knows: a purpose other
    than the default, the type of the action. ``base_call_id`` belongs to the content's own messages.
    """
    found: dict[str, tuple[LlmCall, int, datetime, int]] = {}
    for event in events:
        if isinstance(event, LlmCallMade):
            calls = [event.call]
        elif isinstance(event, Step):
            calls = event.llm_calls
        else:
            continue
        for place, call in enumerate(calls):
            new = (call, event.step, event.occurred_at, place)
            known = found.get(call.call_id)
            if known is None:
                found[call.call_id] = new
            elif known[0].response is None and call.response is not None:
                found[call.call_id] = (_with_hint(call, known[0]), *new[1:])
            else:
                found[call.call_id] = (_with_hint(known[0], call), *known[1:])
    ordered = sorted(found.values(), key=lambda item: (item[1], item[2], item[3], item[0].call_id))
    return [(call, step, occurred_at) for call, step, occurred_at, _ in ordered]


def _with_hint(content: LlmCall, hint: LlmCall) -> LlmCall:
    purpose = hint.purpose if content.purpose == "action" else content.purpose
    action_type = content.action_type or hint.action_type
    if (purpose, action_type) == (content.purpose, content.action_type):
        return content
    return content.model_copy(update={"purpose": purpose, "action_type": action_type})


def written_out(call: LlmCall, by_id: dict[str, LlmCall]) -> list[dict[str, Any]]:
    """A call's whole prompt: its base call's prompt and reply, then its own messages, followed to the first.

    Raises GiveUpError where a base call is missing or the chain runs in a circle.
    """
    parts: list[list[dict[str, Any]]] = [call.messages]
    seen = {call.call_id}
    while call.base_call_id is not None:
        base = by_id.get(call.base_call_id)
        if base is None or base.call_id in seen:
            raise GiveUpError(f"call {call.call_id} extends {call.base_call_id}, which is not a call of this run")
        seen.add(base.call_id)
        reply = (base.response or {}).get("message")
        if reply is not None:
            parts.append([reply])
        parts.append(base.messages)
        call = base
    return [message for part in reversed(parts) for message in part]


def assemble(agent_id: str, trajectory_id: str, raw: Iterable[bytes]) -> Trajectory:
    """Parse a run's events. A call whose chain is broken keeps only the messages it brought itself."""
    bodies = list(raw)
    events = [step_events.validate_json(body) for body in bodies]
    merged = merge_calls(events)
    by_id = {call.call_id: call for call, _, _ in merged}
    calls = []
    for call, step, occurred_at in merged:
        try:
            messages = written_out(call, by_id)
        except GiveUpError:
            messages = call.messages
        calls.append(Call(call, step, messages, occurred_at))
    return Trajectory(
        agent_id,
        trajectory_id,
        next((e for e in events if isinstance(e, TrajectoryStarted)), None),
        sorted((e for e in events if isinstance(e, Step)), key=lambda e: e.step),
        calls,
        next((e for e in events if isinstance(e, TrajectoryEnded)), None),
        bodies,
    )


async def load(pool: Pool, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
    """Runs by key, each put together from ``bodies``; a run that is forgotten, or has no stored bodies, is absent."""
    rows = await pool.fetch(
        """select b.agent_id, b.trajectory_id, b.body
             from bodies b
             join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id) using (agent_id, trajectory_id)
            where b.body is not null
              and not exists (select from forgotten_runs f where f.agent_id = k.agent_id
                                 and f.trajectory_id = k.trajectory_id)
            order by b.agent_id, b.trajectory_id, b.sequence""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )
    grouped: dict[RunKey, list[bytes]] = {}
    for row in rows:
        grouped.setdefault((row["agent_id"], row["trajectory_id"]), []).append(unpacked(row["body"]))
    return {key: assemble(*key, bodies) for key, bodies in grouped.items()}
