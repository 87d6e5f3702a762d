"""What a batch of events says about runs, steps, calls and agents.

Everything here is a pure function of what was published, in the order of the stream's sequence: the same
events give the same rows, however they were gathered into batches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from ratchet_sdk.events import uuid7_time

from services.recorder.envelope import LlmCall, LlmCallMade, Step, StepEvent, TrajectoryEnded, TrajectoryStarted
from shared.errors import GiveUpError
from shared.windows import Window, placed_at, window_at

RunKey = tuple[str, str]

MAX_COUNT = 2**31 - 1


# events -----------------------------------------------------------------------------------------
class Received(NamedTuple):
    """One valid event as it lies in the stream. ``packed`` is the JSON object as it was sent, compressed.

    None where it is not to be kept, since the run is forgotten. ``witnessed``: the gateway saw it happen.
    """

    agent_id: str
    event: StepEvent
    sequence: int
    published_at: datetime
    sha256: bytes
    size_bytes: int
    packed: bytes | None
    witnessed: bool = False

    @property
    def run(self) -> RunKey:
        return (self.agent_id, self.event.trajectory_id)


def day_of(event_id: UUID) -> date:
    """The partition's day: the same id never has two days, whatever the event's other times say."""
    return uuid7_time(event_id).date()


@lru_cache(4096)
def publisher(subject: str) -> tuple[str, bool]:
    """Whose event it is, the one token after ``steps.`` or ``calls.``, and whether the gateway witnessed it.

    Raises GiveUpError for any other subject.
    """
    named = re.fullmatch(r"(steps|calls)\.([A-Za-z0-9_-]{1,64})", subject)
    if named is None:
        raise GiveUpError("the subject must be steps.<agent_id> or calls.<agent_id>, 1 to 64 of A-Z a-z 0-9 _ -")
    return named[2], named[1] == "calls"


# rows -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RunSeen:
    """What events say about one run. ``window`` is a proposal: a run that is stored keeps the one it has."""

    agent_id: str
    trajectory_id: str
    policy: str
    window: Window
    started_at: datetime
    clock_skewed: bool
    first_sequence: int
    started: bool = False
    scenario_id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    expects: tuple[str, ...] = ()
    status: str = "open"
    ended_at: datetime | None = None
    step_count: int | None = None
    ended_sequence: int | None = None
    consistent: bool = True  # its events agree on its policy and its start, and their times can be true


def placement(event: StepEvent, published_at: datetime, window_s: int) -> tuple[Window, datetime, bool]:
    """Window, start that counts, and whether the clock was wrong (invariant 3)."""
    started_at, skewed = placed_at(event.started_at, published_at)
    return window_at(started_at, window_s), started_at, skewed


def happened(item: Received) -> tuple[datetime, bool]:
    """When an event counts as having happened, and whether its own clock was wrong about it."""
    return placed_at(item.event.occurred_at, item.published_at)


def runs_of(events: Iterable[Received], window_s: int) -> dict[RunKey, RunSeen]:
    """Each run once. Its first event places it; its first opening and its first end say the rest."""
    runs: dict[RunKey, RunSeen] = {}
    said: dict[RunKey, tuple[str, datetime]] = {}
    for item in sorted(events, key=lambda item: item.sequence):
        event = item.event
        occurred_at, impossible = happened(item)
        run = runs.get(item.run)
        if run is None:
            window, started_at, skewed = placement(event, item.published_at, window_s)
            run = RunSeen(*item.run, event.policy, window, started_at, skewed, item.sequence)
            said[item.run] = (event.policy, event.started_at)
        if impossible or said[item.run] != (event.policy, event.started_at):
            run = replace(run, consistent=False)
        match event:
            case TrajectoryStarted() if not run.started:
                model = event.model
                run = replace(
                    run,
                    started=True,
                    scenario_id=event.scenario_id,
                    model_name=model.name if model else None,
                    model_version=model.version if model else None,
                    expects=tuple(sorted(set(event.expects))),
                )
            case TrajectoryEnded() if run.ended_sequence is None:
                run = replace(
                    run,
                    status=event.status,
                    ended_at=occurred_at,
                    step_count=event.step_count,
                    ended_sequence=item.sequence,
                )
        runs[item.run] = run
    return runs


class StepSeen(NamedTuple):
    agent_id: str
    trajectory_id: str
    step: int
    event_id: UUID
    occurred_at: datetime
    action_type: str | None
    success: bool | None
    answered: bool | None
    reward: float | None


def steps_of(events: Iterable[Received]) -> list[StepSeen]:
    """The rows of the step events, in the stream's order."""
    found = []
    for item in sorted(events, key=lambda item: item.sequence):
        event = item.event
        if isinstance(event, Step):
            action = event.action
            found.append(
                StepSeen(
                    *item.run,
                    event.step,
                    event.event_id,
                    happened(item)[0],
                    action.type if action else None,
                    action.success if action else None,
                    (action.result is not None or action.error is not None) if action else None,
                    event.reward,
                )
            )
    return found


class CallSeen(NamedTuple):
    """``recorded``: its reply has come. ``purpose`` is None where nobody said more than the default.

    ``witnessed``: the content is what the gateway saw, and not what the agent says of itself.
    """

    agent_id: str
    trajectory_id: str
    call_id: str
    base_call_id: str | None
    step: int
    event_id: UUID
    recorded: bool
    purpose: str | None
    model: str | None
    model_version: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    has_token_ids: bool
    latency_ms: float | None
    occurred_at: datetime
    has_prompt: bool
    witnessed: bool = False


def call_seen(
    run: RunKey, call: LlmCall, step: int, event_id: UUID, occurred_at: datetime, witnessed: bool
) -> CallSeen:
    usage = call.usage or {}
    return CallSeen(
        *run,
        call.call_id,
        call.base_call_id,
        step,
        event_id,
        call.response is not None,
        None if call.purpose == "action" else call.purpose,
        call.model,
        call.model_version,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        bool(call.prompt_token_ids) and bool((call.response or {}).get("token_ids")),
        call.latency_ms,
        occurred_at,
        has_prompt(call),
        witnessed,
    )


def has_prompt(call: LlmCall) -> bool:
    """A message of it says something, or it extends a call, whose prompt is then its own."""
    return call.base_call_id is not None or any(m.get("content") or m.get("tool_calls") for m in call.messages)


def _count(value: Any) -> int | None:
    """A count of tokens, where it is one: usage is the server's own object and may hold anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT else None


def merged(known: CallSeen, other: CallSeen) -> CallSeen:
    """One row of two mentions of a call: the content is what was witnessed, else the first with a reply.

    The other fills in what it lacks; of a witnessed call only the purpose, since an agent names no model that the
    gateway did not see. Never ``base_call_id``: it says what the content's own messages extend.
    """
    later = (other.witnessed, other.recorded) > (known.witnessed, known.recorded)
    content, hint = (other, known) if later else (known, other)
    filled = content._replace(purpose=content.purpose or hint.purpose)
    if content.witnessed and not hint.witnessed:
        return filled
    return filled._replace(model=content.model or hint.model, model_version=content.model_version or hint.model_version)


def calls_of(events: Iterable[Received]) -> dict[tuple[str, str, str], CallSeen]:
    """Each call once, whichever way it came: alone, inside a step, or only referred to."""
    calls: dict[tuple[str, str, str], CallSeen] = {}
    for item in sorted(events, key=lambda item: item.sequence):
        event = item.event
        match event:
            case LlmCallMade():
                mentioned = [event.call]
            case Step():
                mentioned = event.llm_calls
            case _:
                continue
        for call in mentioned:
            seen = call_seen(item.run, call, event.step, event.event_id, happened(item)[0], item.witnessed)
            key = (*item.run, call.call_id)
            calls[key] = merged(calls[key], seen) if key in calls else seen
    return calls


@dataclass(frozen=True, slots=True)
class AgentSeen:
    agent_id: str
    first_seen: datetime
    last_seen: datetime
    versions: frozenset[str]


def agents_of(events: Iterable[Received]) -> dict[str, AgentSeen]:
    """Who published when, by the broker's clock, and with which model versions."""
    by_agent: dict[str, list[Received]] = {}
    for item in events:
        by_agent.setdefault(item.agent_id, []).append(item)
    return {agent_id: _agent_seen(agent_id, items) for agent_id, items in by_agent.items()}


def _agent_seen(agent_id: str, items: Sequence[Received]) -> AgentSeen:
    times = [item.published_at for item in items]
    return AgentSeen(agent_id, min(times), max(times), frozenset().union(*(_versions(item.event) for item in items)))


def _versions(event: StepEvent) -> frozenset[str]:
    match event:
        case TrajectoryStarted(model=model) if model and model.version:
            return frozenset([model.version])
        case LlmCallMade(call=call) if call.model_version:
            return frozenset([call.model_version])
        case Step(llm_calls=calls):
            return frozenset(call.model_version for call in calls if call.model_version)
        case _:
            return frozenset()
