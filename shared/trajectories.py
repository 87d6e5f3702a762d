"""A run put together again from its stored events. Whatever an agent may publish is read: what is unusable is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from ratchet_sdk.events import LlmCall, Step, StepEvent, TrajectoryEnded, TrajectoryStarted, step_events

from shared.bodies import finite, unpacked
from shared.calls import Fault as Fault  # who reads a run reads its faults
from shared.calls import Mention, mentions, merge_calls, reply_of, written_out
from shared.database import Pool
from shared.errors import GiveUpError, reason
from shared.token_records import TokenRecord, kind_of, token_record

RunKey = tuple[str, str]


@dataclass(frozen=True)
class Call:
    """One model call with its prompt written out: ``messages`` is what the model was really asked.

    ``witnessed``: the gateway saw it; else it is what the agent says of itself. ``broken_chain``: it extends a call
    that is not there, so that ``messages`` are only its own.
    """

    call: LlmCall
    step: int
    messages: list[dict[str, Any]]
    occurred_at: datetime
    witnessed: bool = False
    broken_chain: bool = False

    @property
    def reply(self) -> dict[str, Any] | None:
        """The assistant message that came back, or None where none was recorded that can be read."""
        return reply_of(self.call)

    @property
    def tokens(self) -> TokenRecord:
        return token_record(self.call)

    def faults(self) -> list[Fault]:
        """What its server or its agent wrote into it that cannot be used."""
        found = [_reply_fault(self.call), self.tokens.fault]
        return [Fault(self.call.call_id, text) for text in found if text is not None]


def _reply_fault(call: LlmCall) -> str | None:
    if call.response is None or reply_of(call) is not None:
        return None
    return f"response.message is {kind_of(call.response.get('message'))}, expected an object: its reply is not recorded"


@dataclass(frozen=True)
class Trajectory:
    """``unread``: what of its events could not be put together; ``faults`` adds what stands in its calls."""

    agent_id: str
    trajectory_id: str
    started: TrajectoryStarted | None
    steps: list[Step]
    calls: list[Call]
    ended: TrajectoryEnded | None
    unread: list[Fault] = field(default_factory=list)

    @property
    def key(self) -> RunKey:
        return (self.agent_id, self.trajectory_id)

    @property
    def faults(self) -> list[Fault]:
        """All that was left out, each with its reason."""
        return [*self.unread, *(fault for call in self.calls for fault in call.faults())]


# putting it together ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stored:
    """An event as it is kept, unpacked. ``witnessed``: the gateway published it, and no agent could have."""

    body: bytes
    witnessed: bool = False


def assemble(agent_id: str, trajectory_id: str, raw: Iterable[bytes | Stored]) -> Trajectory:
    """A run from its events, in the order of the stream. Raises nothing, whatever they hold.

    An event that does not parse (an older schema) is left out. A call whose chain is broken keeps only the messages
    it brought itself. Each stands in ``faults``.
    """
    events: list[StepEvent] = []
    told: list[Mention] = []
    unread: list[Fault] = []
    for item in raw:
        stored = item if isinstance(item, Stored) else Stored(item)
        try:
            event = step_events.validate_json(finite(stored.body))
        except ValidationError as error:
            unread.append(Fault(None, f"a stored event is not of the contract: {reason(error)}"))
            continue
        events.append(event)
        told += mentions(event, witnessed=stored.witnessed)
    merged, twice = merge_calls(told)
    calls, broken = _whole(merged)
    return Trajectory(
        agent_id,
        trajectory_id,
        next((e for e in events if isinstance(e, TrajectoryStarted)), None),
        sorted((e for e in events if isinstance(e, Step)), key=lambda e: e.step),
        calls,
        next((e for e in events if isinstance(e, TrajectoryEnded)), None),
        [*unread, *twice, *broken],
    )


def _whole(merged: Sequence[Mention]) -> tuple[list[Call], list[Fault]]:
    """The calls with their prompts written out, and those of which that cannot be done."""
    by_id = {mention.call.call_id: mention.call for mention in merged}
    calls, broken = [], []
    for found in merged:
        fault = None
        try:
            messages = written_out(found.call, by_id)
        except GiveUpError as error:
            messages, fault = found.call.messages, f"{error}: what came before is missing from its prompt"
            broken.append(Fault(found.call.call_id, fault))
        calls.append(Call(found.call, found.step, messages, found.occurred_at, found.witnessed, fault is not None))
    return calls, broken


async def load(pool: Pool, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
    """Runs by key, each put together from ``bodies``; a run that is forgotten, or has no stored bodies, is absent."""
    rows = await pool.fetch(
        """select b.agent_id, b.trajectory_id, b.body, b.witnessed
             from bodies b
             join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id) using (agent_id, trajectory_id)
            where b.body is not null
              and not exists (select from forgotten_runs f where f.agent_id = k.agent_id
                                 and f.trajectory_id = k.trajectory_id)
            order by b.agent_id, b.trajectory_id, b.sequence""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )
    grouped: dict[RunKey, list[Stored]] = {}
    for row in rows:
        stored = Stored(unpacked(row["body"]), row["witnessed"])
        grouped.setdefault((row["agent_id"], row["trajectory_id"]), []).append(stored)
    return {key: assemble(*key, bodies) for key, bodies in grouped.items()}
