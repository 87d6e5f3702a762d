"""What a batch must be besides large enough: rested, heard from many, spread over windows. Pure rules on a plan."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.trainer.domain import Entry, Method, Plan, Ready, ScoredGroup, Wait


@dataclass(frozen=True)
class Conditions:
    """``agent_share`` is the most that one agent's runs may be of what is trained; 1 for no limit."""

    cool_down_s: float = 0.0
    min_trajectories: int = 1
    min_windows: int = 1
    agent_share: float = 1.0

    def at_an_operators_wish(self) -> Conditions:
        """What holds where somebody asks for a batch now: no waiting for more, and no agent louder than before."""
        return Conditions(agent_share=self.agent_share)


def cools_until(last: datetime | None, now: datetime, cool_down_s: float) -> datetime | None:
    """When the next batch may be made after the ``last`` trained one; None where it may be made now."""
    if last is None or now >= (rested := last + timedelta(seconds=cool_down_s)):
        return None
    return rested


def held_to(found: Plan, groups: Sequence[ScoredGroup], conditions: Conditions, seed: str) -> Plan:
    """The plan with each agent's runs cut to their share, or what is missing for the conditions."""
    match found:
        case Ready(method, entries):
            entries = shared_out(entries, conditions.agent_share, seed)
            missing = _missing(method, entries, {group.group_id: group.window_id for group in groups}, conditions)
            return Wait(tuple(missing)) if missing else Ready(method, entries)
    return found


def _missing(
    method: Method, entries: Sequence[Entry], window_of: Mapping[str, str], conditions: Conditions
) -> list[str]:
    trained = [entry for entry in entries if entry.left_out is None]
    agents = {entry.agent_id for entry in trained}
    windows = {window_of[entry.group_id] for entry in trained}
    missing = []
    if len(agents) * conditions.agent_share < 1:
        enough = math.ceil(1 / conditions.agent_share)
        missing.append(
            f"{method}: {len(agents)} of {enough} agents, each with {conditions.agent_share:.0%} of it at most"
        )
    if len(trained) < conditions.min_trajectories:
        missing.append(f"{method}: {len(trained)} of {conditions.min_trajectories} trajectories")
    if len(windows) < conditions.min_windows:
        missing.append(f"{method}: groups of {len(windows)} of {conditions.min_windows} windows")
    return missing


def shared_out(entries: Sequence[Entry], share: float, seed: str) -> tuple[Entry, ...]:
    """Leave out runs of agents that have more than ``share`` of what would be trained, drawn from seed and run.

    As few as can be: each agent keeps at most the largest m for which m <= share sum_a min(runs_a, m). Where agents are
    too few for any such m, nothing is left out.
    """
    trained = [entry for entry in entries if entry.left_out is None]
    counts = Counter(entry.agent_id for entry in trained)
    most = next((m for m in range(max(counts.values(), default=0), 0, -1) if _holds(m, counts, share)), None)
    if most is None:
        return tuple(entries)
    drawn = sorted(trained, key=lambda entry: _point(seed, entry))
    kept: Counter[str] = Counter()
    extra: set[int] = set()
    for entry in drawn:
        kept[entry.agent_id] += 1
        if kept[entry.agent_id] > most:
            extra.add(id(entry))
    why = f"its agent has more than {share:.0%} of the batch"
    return tuple(replace(entry, left_out=why) if id(entry) in extra else entry for entry in entries)


def _holds(m: int, counts: Mapping[str, int], share: float) -> bool:
    return m <= share * sum(min(count, m) for count in counts.values()) + 1e-9


def _point(seed: str, entry: Entry) -> bytes:
    return hashlib.sha256(f"{seed}\n{entry.agent_id}\n{entry.trajectory_id}".encode()).digest()
