"""Conversations as the step events that their agents would have published.

Each assistant message that a model said is one model call and one step; its call to a tool is the step's action, the
tool messages that follow the action's result. A call extends the one before, so that a run costs its length once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any
from uuid import UUID

from ratchet_sdk.events import Action, Event, LlmCall, Model, Step, TrajectoryEnded, TrajectoryStarted
from ratchet_sdk.outcomes import Fact, Knowledge, KnowledgeRevealed, TrajectoryJudgedByWorld, TrajectoryOutcome

from services.interchange.conversations import ANSWERS, Conversation, called, spoken

IMPORTED = "imported"


@dataclass(frozen=True)
class Import:
    """What all events of one import share: its id, its one instant, and the policy it is for."""

    import_id: UUID
    at: datetime
    policy: str | None  # None: what each conversation says, or the default
    file_sha256: str

    def event_id(self, *parts: object) -> UUID:
        """A UUIDv7 of the import's time whose random bits hash what the event is: a retry is the same event."""
        text = "\n".join([str(self.import_id), *map(str, parts)])
        value = int(self.at.timestamp() * 1000) << 80 | int.from_bytes(
            hashlib.sha256(text.encode()).digest()[:10], "big"
        )
        value = value & ~(0xF << 76) | 7 << 76
        return UUID(int=value & ~(3 << 62) | 2 << 62)

    def trajectory_id(self, line: int, part: int = 0) -> str:
        """``imp-<import>-<file>-<line>``: the same for a line of a file in an import, new in the next import."""
        several = f"-{part}" if part else ""
        return f"imp-{self.import_id.hex[-12:]}-{self.file_sha256[:8]}-{line:06d}{several}"


@dataclass(frozen=True)
class Run:
    """One conversation as what is published: first ``started``, then the rest in order."""

    agent_id: str
    trajectory_id: str
    started: TrajectoryStarted
    steps: list[Step]
    ended: TrajectoryEnded
    facts: list[Fact]


def run_of(conversation: Conversation, line: int, shared: Import, part: int = 0) -> Run:
    """The events of one conversation, all at the time of the import. Raises ValidationError as the contract does."""
    agent_id, trajectory_id = conversation.agent, shared.trajectory_id(line, part)
    place = (line, part) if part else (line,)

    def head(*parts: object) -> dict[str, Any]:
        return {
            "event_id": shared.event_id(*place, *parts),
            "policy": shared.policy or conversation.policy or "default",
            "trajectory_id": trajectory_id,
            "started_at": shared.at,
            "occurred_at": shared.at,
        }

    calls, after = _calls(conversation)
    steps = [
        Step(**head("step", n), step=n, llm_calls=[call], action=action_of(turn.reply, turn.results))
        for n, (call, turn) in enumerate(calls)
    ]
    task = {"task_id": conversation.task, "trial": conversation.trial}
    metadata = {
        **{key: value for key, value in task.items() if value is not None},
        **conversation.metadata,
        "imported": True,
        "import_id": str(shared.import_id),
        "line": line,
    }
    final = {key: value for key, value in conversation.final.items() if key != "messages_after"}
    return Run(
        agent_id,
        trajectory_id,
        TrajectoryStarted(
            **head("started"),
            scenario_id=conversation.scenario,
            goal=conversation.goal,
            model=Model(name=IMPORTED),
            metadata=metadata,
        ),
        steps,
        TrajectoryEnded.model_validate(
            {
                **head("ended"),
                "status": conversation.status,
                "step_count": len(steps),
                "final": {**final, **({"messages_after": after} if after else {})},
            }
        ),
        [*_facts(conversation, place, agent_id, trajectory_id, shared)],
    )


@dataclass(frozen=True)
class AssistantTurn:
    """A message that a model said: what is new in its prompt, itself with its choice, and what tools answered."""

    prompt: list[dict[str, Any]]
    reply: dict[str, Any]
    results: list[dict[str, Any]]
    choice: dict[str, Any] | None = None


def calls_of(
    messages: Sequence[dict[str, Any]], said: Mapping[int, dict[str, Any] | None] | None = None
) -> tuple[list[AssistantTurn], list[dict[str, Any]]]:
    """Every message that a model said with what came between it and the one before; then what came after the last."""
    said = dict.fromkeys(spoken(messages)) if said is None else said
    turns: list[AssistantTurn] = []
    prompt: list[dict[str, Any]] = []
    for n, message in enumerate(messages):
        if n not in said:
            prompt.append(message)
            continue
        results = list(takewhile(lambda answer: answer["role"] in ANSWERS, messages[n + 1 :]))
        turns.append(AssistantTurn(prompt, message, results, said[n]))
        prompt = []
    return turns, prompt


def _calls(conversation: Conversation) -> tuple[list[tuple[LlmCall, AssistantTurn]], list[dict[str, Any]]]:
    """The calls of every thread, the thread that goes on after its last call at the end; and how that goes on."""
    threads = [(calls_of(thread.messages, thread.said), thread.tools) for thread in conversation.threads]
    calls: list[tuple[LlmCall, AssistantTurn]] = []
    rest: list[dict[str, Any]] = list(conversation.final.get("messages_after") or [])
    for (turns, after), tools in sorted(threads, key=lambda thread: bool(thread[0][1])):
        for n, turn in enumerate(turns):
            calls.append((_llm_call(len(calls), turn, None if n else tools, begins=n == 0), turn))
        rest = after or rest
    return calls, rest


def _llm_call(n: int, turn: AssistantTurn, tools: list[dict[str, Any]] | None, *, begins: bool) -> LlmCall:
    acts = bool(turn.reply.get("tool_calls") or turn.reply.get("function_call"))
    return LlmCall(
        call_id=f"call-{n}",
        base_call_id=None if begins else f"call-{n - 1}",
        purpose="action" if acts else "response",
        model=IMPORTED,
        messages=turn.prompt,
        response=turn.choice or {"index": 0, "finish_reason": "tool_calls" if acts else "stop", "message": turn.reply},
        tools=tools,
    )


def action_of(reply: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Action | None:
    """The tools that a reply calls, with what they answered; None where it only speaks.

    What nobody answered (the conversation ended there) has an error instead of a result; null is an empty answer.
    """
    one = reply.get("function_call")
    tools = [tool for call in reply.get("tool_calls") or ([{"function": one}] if one else []) if (tool := called(call))]
    if not tools:
        return None
    answers = ["" if (content := answer.get("content")) is None else content for answer in results]
    several = [{"name": tool["name"], "arguments": _arguments(tool)} for tool in tools]
    return Action(
        type=tools[0]["name"][:200],
        parameters=several[0]["arguments"] if len(tools) == 1 else {"calls": several},
        result=(answers[0] if len(answers) == 1 else answers) if answers else None,
        error=None if answers else "the conversation ended before the tool answered",
    )


def _arguments(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a function; of a custom tool its input, which is text."""
    if "input" in tool and "arguments" not in tool:
        return {"input": tool["input"]}
    value = tool.get("arguments")
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": value}


def _facts(
    conversation: Conversation, place: tuple[int, ...], agent_id: str, trajectory_id: str, shared: Import
) -> Iterator[Fact]:
    if conversation.reward is not None:
        outcome = TrajectoryOutcome(
            agent_id=agent_id, trajectory_id=trajectory_id, name="reward", value=conversation.reward
        )
        yield TrajectoryJudgedByWorld(
            event_id=shared.event_id(*place, "reward"), occurred_at=shared.at, trajectory=outcome
        )
    if conversation.instruction is not None:
        knowledge = Knowledge(
            agent_id=agent_id, trajectory_id=trajectory_id, data={"instruction": conversation.instruction}
        )
        yield KnowledgeRevealed(
            event_id=shared.event_id(*place, "knowledge"), occurred_at=shared.at, knowledge=knowledge
        )


def encoded(event: Event | Fact) -> bytes:
    """The JSON object that travels: fields that are not there are left out."""
    return event.model_dump_json(by_alias=True, exclude_none=True).encode()
