"""Recorded conversations in OpenAI chat format, and the groups of ``ratchet export``: what a line of each holds.

Ordinary are also 2023's ``functions`` and ``function_call``, ``weight: 0``, ``developer``, custom tools, a tool that
answered null, and a conversation that the assistant begins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.errors import GiveUpError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ANSWERS = ("tool", "function")  # what a tool said; `function` was its role in 2023
STATUSES = {"completed": "completed", "failed": "failed", "truncated": "truncated", "open": "truncated"}
TIME_KEYS = ("started_at", "created_at", "timestamp", "time")
KNOWN_KEYS = {"task_id", "trial", "reward", "instruction", "messages", "tools", "functions", "metadata", *TIME_KEYS}
# What an exported line says besides: what comes back as it was, and where it came from, which goes to the metadata.
RESTORED_KEYS = {"policy", "scenario_id", "status", "goal", "final", "context", "history"}
SOURCE_KEYS = ("agent_id", "trajectory_id", "window_id", "started_at", "model_name", "model_version")

Message = dict[str, Any]


@dataclass(frozen=True)
class Thread:
    """Messages in their order. ``said``: indices of those that a model said, with the whole choice where it is known.

    Every other assistant message was given to the model: an example, or a greeting.
    """

    messages: list[Message]
    said: Mapping[int, dict[str, Any] | None]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Conversation:
    """One run. ``agent_id`` and ``scenario_id`` are its own where an export says so, else made from trial and task."""

    task: str | None
    trial: str | None
    messages: list[Message]
    reward: float | None = None
    instruction: str | None = None
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    agent_id: str | None = None
    scenario_id: str | None = None
    policy: str | None = None
    status: str = "completed"
    goal: str | None = None
    final: dict[str, Any] = field(default_factory=dict)
    said: Mapping[int, dict[str, Any] | None] | None = None
    others: tuple[Thread, ...] = ()
    history: int = 0  # of an exported run with several conversations, each a line: which of them

    @property
    def agent(self) -> str:
        return self.agent_id or f"trial-{self.trial}"

    @property
    def scenario(self) -> str | None:
        return self.scenario_id if self.task is None else f"task-{self.task}"

    @property
    def threads(self) -> tuple[Thread, ...]:
        said = dict.fromkeys(spoken(self.messages)) if self.said is None else self.said
        return (Thread(self.messages, said, self.tools), *self.others)

    def goes_on(self, before: Conversation) -> bool:
        """Whether it is the next conversation of the same exported run."""
        mine, theirs = self.metadata.get("source"), before.metadata.get("source")
        return self.history == before.history + 1 and mine is not None and mine == theirs


def spoken(messages: Sequence[Mapping[str, Any]], context: Sequence[int] = ()) -> list[int]:
    """Indices of the assistant messages that a model said.

    Not of those in ``context``, of weight 0, or before anything that a model could have answered; but where that
    leaves none, of all.
    """
    roles = [message["role"] for message in messages]
    assistant = [n for n, role in enumerate(roles) if role == "assistant"]
    asked = next((n for n, role in enumerate(roles) if role != "assistant"), len(roles))
    own = [n for n in assistant if n > asked and n not in context and messages[n].get("weight") != 0]
    return own or assistant


# a conversation a line ----------------------------------------------------------------------------
def conversation_of(value: Any) -> Conversation:
    """The conversation in one JSON object. Raises GiveUpError naming the key that is wrong."""
    if not isinstance(value, Mapping):
        raise GiveUpError("it is not a JSON object")
    if "messages" not in value and "trajectories" in value:
        raise GiveUpError("it is a group; import it with --format groups")
    messages = _messages(value.get("messages"))
    exported = "trajectory_id" in value and "agent_id" in value
    if not exported and "task_id" not in value and "scenario_id" not in value:
        raise GiveUpError("task_id is missing: it says which conversations met the same task")
    tasked = "task_id" in value and not exported
    restored = {key: value[key] for key in RESTORED_KEYS if value.get(key) is not None} if exported else {}
    context = restored.get("context", [])
    return Conversation(
        task=_token(value["task_id"], "task_id") if tasked else None,
        trial=None if exported else _token(value.get("trial", 0), "trial"),
        messages=messages,
        reward=_reward(value.get("reward")),
        instruction=_text(value, "instruction"),
        tools=_tools(value),
        metadata=_metadata(value, exported=exported, tasked=tasked),
        agent_id=_agent(value["agent_id"]) if exported else None,
        scenario_id=None if tasked else _text(value, "scenario_id"),
        policy=_text(restored, "policy"),
        status=STATUSES.get(str(restored.get("status")), "completed"),
        goal=_text(restored, "goal"),
        final=_object(restored, "final"),
        said=dict.fromkeys(spoken(messages, context)) if isinstance(context, list) else None,
        history=found if isinstance(found := restored.get("history"), int) else 0,
    )


def _metadata(value: Mapping[str, Any], *, exported: bool, tasked: bool) -> dict[str, Any]:
    """An exported run's own metadata, where it came from, its time, and what else stood in the line."""
    own = value.get("metadata")
    kept = dict(own) if isinstance(own, Mapping) else {}
    known = KNOWN_KEYS | (RESTORED_KEYS | set(SOURCE_KEYS) if exported else set() if tasked else {"scenario_id"})
    rest = {key: item for key, item in value.items() if key not in known}
    if own is not None and not isinstance(own, Mapping):
        rest["metadata"] = own
    original = next((value[key] for key in TIME_KEYS if value.get(key) is not None), None)
    found: dict[str, Any] = {"original_time": original} if original is not None else {}
    if exported:
        found["source"] = {key: value[key] for key in SOURCE_KEYS if value.get(key) is not None}
    earlier = kept.get("row")
    if rest:
        kept["row"] = {**rest, **earlier} if isinstance(earlier, Mapping) else rest
    return {**found, **kept}


# a group a line -----------------------------------------------------------------------------------
def conversations_of_group(value: Any) -> list[Conversation]:
    """The runs of one exported group. Raises GiveUpError naming what is wrong.

    A run's reward is the one of record; the judge's score is of its group, and is made anew.
    """
    if not isinstance(value, Mapping) or not isinstance(runs := value.get("trajectories"), list):
        raise GiveUpError("it is no group: it has no list of trajectories")
    if not runs and not value.get("forgotten"):
        raise GiveUpError("its trajectories are empty")
    return [_member(value, n, run) for n, run in enumerate(runs)]


def _member(group: Mapping[str, Any], n: int, run: Any) -> Conversation:
    where = f"trajectories[{n}]"
    if not isinstance(run, Mapping) or not isinstance(known := run.get("metadata"), Mapping):
        raise GiveUpError(f"{where} must be an object with metadata")
    more = _object(run, "run")
    others = run.get("additional_histories") or []
    first, *rest = [_thread(history, where) for history in (run, *others)]
    source = {key: known[key] for key in SOURCE_KEYS if known.get(key) is not None}
    return Conversation(
        task=None,
        trial=None,
        messages=first.messages,
        reward=_reward(_object(run, "metrics").get("reward_of_record")),
        instruction=_text(more, "instruction"),
        tools=first.tools,
        metadata={"source": source, **_object(more, "metadata")},
        agent_id=_agent(known.get("agent_id")),
        scenario_id=_text(group, "scenario_id"),
        policy=_text(group, "policy"),
        status=STATUSES.get(str(known.get("status")), "completed"),
        goal=_text(more, "goal"),
        final=_object(more, "final"),
        said=first.said,
        others=tuple(rest),
    )


def _thread(history: Mapping[str, Any], where: str) -> Thread:
    items = history.get("messages_and_choices")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise GiveUpError(f"{where}.messages_and_choices must be a list of objects")
    items = [*items, *(history.get("after") or [])]
    said = {n: dict(item) for n, item in enumerate(items) if "message" in item and "role" not in item}
    messages = _messages([item["message"] if n in said else item for n, item in enumerate(items)])
    return Thread(messages, said, history.get("tools") or None)


# what each key may hold ---------------------------------------------------------------------------
def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise GiveUpError("messages must be a list that is not empty")
    for n, message in enumerate(messages):
        _check_message(n, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise GiveUpError("messages hold no assistant message: there is nothing that a model did")
    return messages


def _check_message(n: int, message: Any) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise GiveUpError(f"messages[{n}] must be an object with a role of {', '.join(ROLES)}")
    content, calls, call = message.get("content"), message.get("tool_calls"), message.get("function_call")
    if content is not None and not isinstance(content, (str, list)):
        raise GiveUpError(f"messages[{n}].content must be text, a list of parts, or null")
    if calls is not None and not (isinstance(calls, list) and all(called(one) for one in calls)):
        raise GiveUpError(f"messages[{n}].tool_calls must be a list of objects with function.name or custom.name")
    if call is not None and not called({"function": call}):
        raise GiveUpError(f"messages[{n}].function_call must be an object with a name")


def called(call: Any) -> Mapping[str, Any] | None:
    """The function, or the custom tool, that a tool call names; None where it names nothing."""
    for kind in ("function", "custom"):
        tool = call.get(kind) if isinstance(call, Mapping) else None
        if isinstance(tool, Mapping) and isinstance(tool.get("name"), str) and tool["name"]:
            return tool
    return None


def _tools(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """``tools``, or 2023's ``functions`` as tools."""
    functions = value.get("functions") or []
    if not isinstance(functions, list) or not all(isinstance(one, Mapping) and "name" in one for one in functions):
        raise GiveUpError("functions must be a list of objects with a name")
    return value.get("tools") or [{"type": "function", "function": one} for one in functions] or None


def _reward(reward: Any) -> float | None:
    if reward is not None and (
        isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward)
    ):
        raise GiveUpError("reward must be a finite number or absent")
    return None if reward is None else float(reward)


def _text(value: Mapping[str, Any], key: str) -> str | None:
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise GiveUpError(f"{key} must be text or absent")
    return found


def _object(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key) or {}
    if not isinstance(found, Mapping):
        raise GiveUpError(f"{key} must be an object or absent")
    return dict(found)


def _agent(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise GiveUpError("agent_id must be 1 to 64 letters, digits, _ and -")
    return value


def _token(value: Any, key: str) -> str:
    """A task or trial as part of an id."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,56}", text):
        raise GiveUpError(f"{key} must be a number or up to 56 letters, digits, _ and -")
    return text
