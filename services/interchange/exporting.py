"""`ratchet export`: what was judged, as JSONL that trainers read.

``groups``: a group a line, each trajectory with ``messages_and_choices`` (a choice where the model spoke, with
its logprobs and token ids as they came), ``tools`` and ``reward`` (the judge's score), so that
``art.TrajectoryGroup`` can be built from trajectories. ``openai-chat``: a conversation a line. ``ratchet import`` reads
both: beside what the formats ask for stands what a run is besides its messages (``goal``, ``metadata``, ``final``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from services.interchange import store
from services.terminal.output import json_text
from shared.trajectories import Call, Trajectory, load

if TYPE_CHECKING:
    from shared.database import Pool

AT_ONCE = 50  # groups or runs that are in memory at a time

Message = dict[str, Any]


@dataclass
class History:
    """A conversation as it grew: every message, and for those that the model said the whole choice."""

    messages: list[Message] = field(default_factory=list)
    messages_and_choices: list[dict[str, Any]] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    newest: int = 0  # which of the run's calls is its last
    after: list[Message] = field(default_factory=list)  # what came after that, where it was the run's last

    def extends_to(self, call: Call) -> bool:
        return call.messages[: len(self.messages)] == self.messages

    def add(self, call: Call) -> None:
        new = call.messages[len(self.messages) :]
        self.messages += new
        self.messages_and_choices += new
        self.tools = call.call.tools or self.tools
        if call.reply is not None and call.call.response is not None:
            self.said.append(len(self.messages))
            self.messages.append(call.reply)
            self.messages_and_choices.append({"index": 0, "finish_reason": "stop", **call.call.response})

    @property
    def whole(self) -> list[Message]:
        return [*self.messages, *self.after]

    @property
    def context(self) -> list[int]:
        """Assistant messages that were given to the model, not said by it: their places among the messages."""
        given = (n for n, message in enumerate(self.whole) if message.get("role") == "assistant")
        return [n for n in given if n not in self.said]


def histories(calls: Iterable[Call]) -> list[History]:
    """Calls as conversations: a call that repeats a conversation and goes on extends it, any other begins one."""
    found: list[History] = []
    for number, call in enumerate(calls):
        history = next((h for h in reversed(found) if h.extends_to(call)), None)
        if history is None:
            history = History()
            found.append(history)
        history.add(call)
        history.newest = number
    return found


async def groups(pool: Pool, window_id: str | None, policy: str | None, states: Sequence[str]) -> AsyncIterator[str]:
    """A line for each group; a member whose bodies were forgotten is named in ``forgotten``."""
    chosen = await store.groups(pool, window_id, policy, states)
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        members = await store.members(pool, [group["group_id"] for group in part])
        loaded = await load(pool, [(m["agent_id"], m["trajectory_id"]) for m in members])
        for group in part:
            own = [m for m in members if m["group_id"] == group["group_id"]]
            there = [m for m in own if (m["agent_id"], m["trajectory_id"]) in loaded]
            yield line(
                {
                    **group,
                    "trajectories": [
                        as_art(m, loaded[m["agent_id"], m["trajectory_id"]], group["judge"]) for m in there
                    ],
                    "forgotten": [m["trajectory_id"] for m in own if m not in there],
                }
            )


def as_art(member: dict[str, Any], run: Trajectory, judge: str | None) -> dict[str, Any]:
    """In the shape of ``art.Trajectory``: the longest conversation first, others beside it."""
    found, more = _told(run, member)
    first, *others = [
        {"messages_and_choices": h.messages_and_choices, "tools": h.tools, **({"after": h.after} if h.after else {})}
        for h in sorted(found, key=lambda h: -len(h.messages)) or [History()]
    ]
    metrics = {"rank": member["rank"]}
    if member["reward_of_record"] is not None:
        metrics["reward_of_record"] = member["reward_of_record"]
    return {
        **first,
        "additional_histories": others,
        "reward": member["score"],
        "metrics": metrics,
        "metadata": {
            "agent_id": member["agent_id"],
            "trajectory_id": member["trajectory_id"],
            "model_version": member["model_version"],
            "status": member["status"],
            "judge": judge,
        },
        "logs": [member["explanation"]] if member["explanation"] else [],
        "run": more,
    }


async def conversations(pool: Pool, window_id: str | None, policy: str | None) -> AsyncIterator[str]:
    """A line for each conversation of each run; ``messages`` in OpenAI chat format, ``reward`` that of record."""
    chosen = await store.runs(pool, window_id, policy)
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        loaded = await load(pool, [(row["agent_id"], row["trajectory_id"]) for row in part])
        for row in part:
            run = loaded.get((row["agent_id"], row["trajectory_id"]))
            for told in conversations_of(row, run) if run else []:
                yield line(told)


def conversations_of(row: dict[str, Any], run: Trajectory) -> Iterator[dict[str, Any]]:
    """``context``: assistant messages that no model said; ``history``: which conversation of a run, from its second."""
    found, more = _told(run, row)
    for n, history in enumerate(found):
        place = {"context": history.context, "history": n}
        known = {key: value for key, value in row.items() if key != "instruction"}
        yield {
            **known,
            "messages": history.whole,
            "tools": history.tools,
            **more,
            **{k: v for k, v in place.items() if v},
        }


def _told(run: Trajectory, row: dict[str, Any]) -> tuple[list[History], dict[str, Any]]:
    """A run's conversations, and what it is besides them, as far as it says anything."""
    found = histories(run.calls)
    final = dict(run.ended.final) if run.ended else {}
    after = final.get("messages_after")
    if found and isinstance(after, list) and all(isinstance(message, dict) for message in after):
        max(found, key=lambda h: h.newest).after = final.pop("messages_after")
    told = {
        "goal": run.started.goal if run.started else None,
        "metadata": run.started.metadata if run.started else None,
        "final": final,
        "instruction": row.get("instruction"),
    }
    return found, {key: value for key, value in told.items() if value is not None and value != {}}


def line(value: dict[str, Any]) -> str:
    return json_text(value, ascii_only=False)
