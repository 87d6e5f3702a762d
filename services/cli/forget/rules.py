"""Which message of a stream, and which line of an export, is of a run that is to be forgotten. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

RunKey = tuple[str, str]

OF_AGENTS = ("steps", "calls")  # first words of subjects whose last one names the agent

TRAJECTORY = re.compile(rb'"trajectory_id"\s*:\s*"([A-Za-z0-9._:~-]{1,128})"')
AGENT = re.compile(rb'"agent_id"\s*:\s*"([A-Za-z0-9_-]{1,64})"')


@dataclass(frozen=True)
class Selection:
    """Runs that fulfil all of what is given: of an agent, of an id, begun before an instant."""

    agent_id: str | None = None
    trajectory_id: str | None = None
    before: datetime | None = None

    def document(self) -> dict[str, Any]:
        found = {"agent": self.agent_id, "trajectory": self.trajectory_id, "before": self.before}
        return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in found.items() if v is not None}

    def words(self) -> str:
        parts = [
            f"of agent {self.agent_id}" if self.agent_id else "",
            f"with the id {self.trajectory_id}" if self.trajectory_id else "",
            f"begun before {self.before.isoformat()}" if self.before else "",
        ]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Sent:
    """A message as its publisher sent it. ``content`` is None where it cannot be unpacked."""

    subject: str
    published_at: datetime
    content: bytes | None


def is_about(sent: Sent, runs: Collection[RunKey], selection: Selection) -> bool:
    """Whether a message on ``steps.*``, ``calls.*`` or ``outcomes.*`` is about one of the runs.

    What names no run at all belongs to its publisher: it goes with all of an agent's, and with all that is older than
    an instant, and stays where a single run is meant.
    """
    named = runs_named(sent)
    head, _, publisher = sent.subject.partition(".")
    if head in OF_AGENTS and not named:
        return _nameless_goes(publisher, sent.published_at, selection)
    return any(run in runs for run in named)


def runs_named(sent: Sent) -> set[RunKey]:
    """The runs that a message is about; what is no JSON is looked through for ids all the same."""
    head, _, publisher = sent.subject.partition(".")
    content = sent.content or b""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        ids = {found.decode() for found in TRAJECTORY.findall(content)}
        agents = {publisher} if head in OF_AGENTS else {found.decode() for found in AGENT.findall(content)}
        return {(agent_id, trajectory_id) for agent_id in agents for trajectory_id in ids}
    objects = [value, *(value.get(kind) for kind in ("trajectory", "knowledge"))] if isinstance(value, dict) else []
    if head in OF_AGENTS:
        objects = [{**value, "agent_id": publisher}] if objects else []
    found = [(o.get("agent_id"), o.get("trajectory_id")) for o in objects if isinstance(o, dict)]
    return {(a, t) for a, t in found if isinstance(a, str) and isinstance(t, str)}


def _nameless_goes(publisher: str, published_at: datetime, selection: Selection) -> bool:
    if selection.trajectory_id is not None:
        return False
    of_agent = selection.agent_id in (None, publisher)
    return of_agent and (selection.before is None or published_at < selection.before)


# exports ------------------------------------------------------------------------------------------
def without(line: str, runs: Collection[RunKey]) -> tuple[str | None, int]:
    """A line of an export without these runs, None where nothing of it is left, and how many were in it.

    Of a group, the others' explanations go too: a judge may quote one run where it speaks of another.
    """
    value = json.loads(line)
    if "trajectories" not in value:
        mine = (value.get("agent_id"), value.get("trajectory_id")) in runs
        return (None, 1) if mine else (line, 0)
    stay = [t for t in value["trajectories"] if _key(t) not in runs]
    gone = len(value["trajectories"]) - len(stay)
    if not gone:
        return line, 0
    forgotten = [t["metadata"]["trajectory_id"] for t in value["trajectories"] if _key(t) in runs]
    value["trajectories"] = [{**t, "logs": []} for t in stay]
    value["forgotten"] = [*value.get("forgotten", []), *forgotten]
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")), gone


def _key(trajectory: dict[str, Any]) -> RunKey:
    return trajectory["metadata"]["agent_id"], trajectory["metadata"]["trajectory_id"]
