"""Recorded conversations in OpenAI chat format, as the step events that their agents would have published.

Each assistant message is one model call and one step; its call to a tool is the step's action, the tool
messages that follow the action's result. A call extends the one before, so that a run costs its length once.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from ratchet_sdk.events import Action, Event, LlmCall, Model, Step, TrajectoryEnded, TrajectoryStarted
from ratchet_sdk.outcomes import Fact, Knowledge, KnowledgeRevealed, TrajectoryJudgedByWorld, TrajectoryOutcome
from ratchet_sdk.values import mended

from shared.errors import ConfigurationError, GiveUpError

ROLES = ("system", "developer", "user", "assistant", "tool")
TIME_KEYS = ("started_at", "created_at", "timestamp", "time")
KNOWN_KEYS = {"task_id", "trial", "reward", "instruction", "messages", "tools", *TIME_KEYS}
IMPORTED = "imported"


@dataclass(frozen=True)
class Conversation:
    task: str
    trial: str
    messages: list[dict[str, Any]]
    reward: float | None = None
    instruction: str | None = None
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A line of a file: a conversation, or what is wrong with it."""

    line: int
    conversation: Conversation | None = None
    fault: str = ""


@dataclass(frozen=True)
class Import:
    """What all events of one import share: its id, its one instant, and the policy it is for."""

    import_id: UUID
    at: datetime
    policy: str
    file_sha256: str

    def event_id(self, *parts: object) -> UUID:
        """A UUIDv7 of the import's time whose random bits hash what the event is: a retry is the same event."""
        text = "\n".join([str(self.import_id), *map(str, parts)])
        value = int(self.at.timestamp() * 1000) << 80 | int.from_bytes(
            hashlib.sha256(text.encode()).digest()[:10], "big"
        )
        value = value & ~(0xF << 76) | 7 << 76
        return UUID(int=value & ~(3 << 62) | 2 << 62)

    def trajectory_id(self, line: int) -> str:
        """``imp-<import>-<file>-<line>``: the same for a line of a file in an import, new in the next import."""
        return f"imp-{self.import_id.hex[-12:]}-{self.file_sha256[:8]}-{line:06d}"


@dataclass(frozen=True)
class Run:
    """One conversation as what is published: first ``started``, then the rest in order."""

    agent_id: str
    trajectory_id: str
    started: TrajectoryStarted
    steps: list[Step]
    ended: TrajectoryEnded
    facts: list[Fact]


# reading ------------------------------------------------------------------------------------------
def read_file(path: Path) -> Iterator[Line]:
    """Each line that is not empty. Raises ConfigurationError where the file cannot be read at all."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield read_line(number, line)
    except (EOFError, zlib.error) as error:
        raise GiveUpError(f"{path} is cut off or damaged: {error}; get it again") from error
    except gzip.BadGzipFile as error:
        raise GiveUpError(f"{path} is not gzip as its name says; rename or compress it") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}; give an existing file") from error


def read_line(number: int, line: bytes) -> Line:
    try:
        value = mended(json.loads(line.decode("utf-8-sig")))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what cannot be sent is refused here
        return Line(number, conversation_of(value))
    except UnicodeError:
        return Line(number, fault="it is not UTF-8 text")
    except json.JSONDecodeError as error:
        return Line(number, fault=f"it is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Line(number, fault="it is nested too deeply")
    except (GiveUpError, ValueError) as error:
        return Line(number, fault=str(error))


def conversation_of(value: Any) -> Conversation:
    """The conversation in one JSON object. Raises GiveUpError naming the key that is wrong."""
    if not isinstance(value, Mapping):
        raise GiveUpError("it is not a JSON object")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise GiveUpError("messages must be a list that is not empty")
    for n, message in enumerate(messages):
        _check_message(n, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise GiveUpError("messages hold no assistant message: there is nothing that a model did")
    reward = value.get("reward")
    if reward is not None and (
        isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward)
    ):
        raise GiveUpError("reward must be a finite number or absent")
    if "task_id" not in value:
        raise GiveUpError("task_id is missing: it says which conversations met the same task")
    instruction = value.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise GiveUpError("instruction must be text or absent")
    original = next((value[key] for key in TIME_KEYS if value.get(key) is not None), None)
    rest = {key: item for key, item in value.items() if key not in KNOWN_KEYS}
    return Conversation(
        task=_token(value["task_id"], "task_id"),
        trial=_token(value.get("trial", 0), "trial"),
        messages=messages,
        reward=None if reward is None else float(reward),
        instruction=instruction,
        tools=value.get("tools") or None,
        metadata={**({"original_time": original} if original is not None else {}), **({"row": rest} if rest else {})},
    )


def _check_message(n: int, message: Any) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise GiveUpError(f"messages[{n}] must be an object with a role of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None and not isinstance(content, (str, list)):
        raise GiveUpError(f"messages[{n}].content must be text, a list of parts, or null")
    if calls is not None and not (isinstance(calls, list) and all(_is_tool_call(call) for call in calls)):
        raise GiveUpError(f"messages[{n}].tool_calls must be a list of objects with function.name")


def _is_tool_call(call: Any) -> bool:
    return (
        isinstance(call, Mapping)
        and isinstance(call.get("function"), Mapping)
        and isinstance(call["function"].get("name"), str)
        and bool(call["function"]["name"])
    )


def _token(value: Any, key: str) -> str:
    """A task or trial as part of an id."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,56}", text):
        raise GiveUpError(f"{key} must be a number or up to 56 letters, digits, _ and -")
    return text


# as events ----------------------------------------------------------------------------------------
def run_of(conversation: Conversation, line: int, shared: Import) -> Run:
    """The events of one conversation, all at the time of the import. Raises ValidationError as the contract does."""
    agent_id, trajectory_id = f"trial-{conversation.trial}", shared.trajectory_id(line)

    def head(*parts: object) -> dict[str, Any]:
        return {
            "event_id": shared.event_id(line, *parts),
            "policy": shared.policy,
            "trajectory_id": trajectory_id,
            "started_at": shared.at,
            "occurred_at": shared.at,
        }

    calls, after = calls_of(conversation.messages)
    steps = [
        Step(
            **head("step", n),
            step=n,
            llm_calls=[_llm_call(n, call, conversation.tools)],
            action=action_of(call.reply, call.results),
        )
        for n, call in enumerate(calls)
    ]
    return Run(
        agent_id,
        trajectory_id,
        TrajectoryStarted(
            **head("started"),
            scenario_id=f"task-{conversation.task}",
            model=Model(name=IMPORTED),
            metadata={
                "imported": True,
                "import_id": str(shared.import_id),
                "line": line,
                "task_id": conversation.task,
                "trial": conversation.trial,
                **conversation.metadata,
            },
        ),
        steps,
        TrajectoryEnded(
            **head("ended"), status="completed", step_count=len(steps), final={"messages_after": after} if after else {}
        ),
        _facts(conversation, line, agent_id, trajectory_id, shared),
    )


@dataclass(frozen=True)
class AssistantTurn:
    """One assistant message: what is new in its prompt, itself, and the tool messages that answer it."""

    prompt: list[dict[str, Any]]
    reply: dict[str, Any]
    results: list[dict[str, Any]]


def calls_of(messages: Sequence[dict[str, Any]]) -> tuple[list[AssistantTurn], list[dict[str, Any]]]:
    """Every assistant message with what came between it and the one before; then what came after the last."""
    turns: list[AssistantTurn] = []
    prompt: list[dict[str, Any]] = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            prompt.append(message)
            continue
        results = []
        for answer in messages[n + 1 :]:
            if answer["role"] != "tool":
                break
            results.append(answer)
        turns.append(AssistantTurn(prompt, message, results))
        prompt = []
    return turns, prompt


def _llm_call(n: int, turn: AssistantTurn, tools: list[dict[str, Any]] | None) -> LlmCall:
    acts = bool(turn.reply.get("tool_calls"))
    return LlmCall(
        call_id=f"call-{n}",
        base_call_id=f"call-{n - 1}" if n else None,
        purpose="action" if acts else "response",
        model=IMPORTED,
        messages=turn.prompt,
        response={"index": 0, "finish_reason": "tool_calls" if acts else "stop", "message": turn.reply},
        tools=tools if n == 0 else None,
    )


def action_of(reply: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Action | None:
    """The tools that a reply calls, with what they answered; None where it only speaks.

    What nobody answered (the conversation ended there) has an error instead of a result.
    """
    calls = reply.get("tool_calls") or []
    if not calls:
        return None
    answers = [answer.get("content") for answer in results]
    functions = [call["function"] for call in calls]
    several = [{"name": f["name"], "arguments": _arguments(f.get("arguments"))} for f in functions]
    return Action(
        type=functions[0]["name"][:200],
        parameters=several[0]["arguments"] if len(calls) == 1 else {"calls": several},
        result=(answers[0] if len(answers) == 1 else answers) if answers else None,
        error=None if answers else "the conversation ended before the tool answered",
    )


def _arguments(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": value}


def _facts(conversation: Conversation, line: int, agent_id: str, trajectory_id: str, shared: Import) -> list[Fact]:
    facts: list[Fact] = []
    if conversation.reward is not None:
        outcome = TrajectoryOutcome(
            agent_id=agent_id, trajectory_id=trajectory_id, name="reward", value=conversation.reward
        )
        facts.append(
            TrajectoryJudgedByWorld(event_id=shared.event_id(line, "reward"), occurred_at=shared.at, trajectory=outcome)
        )
    if conversation.instruction is not None:
        knowledge = Knowledge(
            agent_id=agent_id, trajectory_id=trajectory_id, data={"instruction": conversation.instruction}
        )
        facts.append(
            KnowledgeRevealed(event_id=shared.event_id(line, "knowledge"), occurred_at=shared.at, knowledge=knowledge)
        )
    return facts


def encoded(event: Event | Fact) -> bytes:
    """The JSON object that travels: fields that are not there are left out."""
    return event.model_dump_json(by_alias=True, exclude_none=True).encode()
