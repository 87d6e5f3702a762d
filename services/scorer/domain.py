"""Groups, starts, ranks and scores. Pure.

Source of the rules: design, invariants 7 (a group is one situation) and 9 (the reward of record); the idea of
scoring several attempts at one situation relative to each other is RULER's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from shared.trajectories import RunKey, Trajectory

TIE = 1e-9  # a smaller difference is rounding, not merit
UNREWARDED_IS_LAST = ("failed", "truncated")  # the policy's own failure: no reward is the worst reward


@dataclass(frozen=True)
class Run:
    """What is known of a run when its window is resolved. ``signature`` is None where its events are forgotten."""

    agent_id: str
    trajectory_id: str
    policy: str
    scenario_id: str
    status: str
    late: bool
    called: bool
    rewarded: bool
    signature: str | None

    @property
    def key(self) -> RunKey:
        return (self.agent_id, self.trajectory_id)


@dataclass(frozen=True)
class Member:
    """A run in its group; ``left_out`` says why it is not judged."""

    key: RunKey
    left_out: str | None


@dataclass(frozen=True)
class Group:
    group_id: str
    policy: str
    window_id: str
    scenario_id: str
    part: int
    homogeneous: bool
    members: tuple[Member, ...]

    @property
    def judged(self) -> int:
        return sum(member.left_out is None for member in self.members)


# grouping ---------------------------------------------------------------------------------------
def reason_left_out(run: Run, *, by_outcome: bool) -> str | None:
    """Why a run is not judged, or None. What infrastructure broke is left out; what the policy broke stays."""
    if run.late:
        return "late: it was stored after its window had closed"
    if run.status == "open":
        return "it never ended"
    if not run.called:
        return "no model call of it was recorded"
    if run.signature is None:
        return "its events are not stored any more"
    if by_outcome and not run.rewarded and run.status not in UNREWARDED_IS_LAST:
        return "no reward of record"
    return None


def order_of(key: RunKey) -> int:
    """Where a run stands when a set is split: by a hash of its name, so that arrival plays no part."""
    return int.from_bytes(hashlib.sha256(f"{key[0]}\n{key[1]}".encode()).digest()[:8], "big")


def partition(keys: Sequence[RunKey], group_max: int) -> list[list[RunKey]]:
    """Split n runs into ceil(n / group_max) parts whose sizes differ by at most one, in order of their hashes."""
    ordered = sorted(keys, key=lambda key: (order_of(key), key))
    count = math.ceil(len(ordered) / group_max)
    edges = [part * len(ordered) // count for part in range(count + 1)] if count else [0]
    return [ordered[start:end] for start, end in pairwise(edges)]


def group_id(policy: str, window_id: str, scenario_id: str, part: int) -> str:
    """``<policy>-<window>-<16 hex digits>``: readable, safe in a URL, and the same whoever makes it."""
    text = json.dumps([policy, window_id, scenario_id, part])
    return f"{policy}-{re.sub(r'[^0-9A-Za-z]', '', window_id)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def form_groups(window_id: str, runs: Sequence[Run], *, group_max: int, by_outcome: bool) -> list[Group]:
    """All groups of a window: (policy, scenario), split where over ``group_max`` are to be judged.

    Who is left out stands in one of the parts, by its hash, and changes neither the number of parts nor their sizes.
    """
    situations: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        situations.setdefault((run.policy, run.scenario_id), []).append(run)
    groups = []
    for (policy, scenario_id), present in sorted(situations.items()):
        by_key = {run.key: run for run in present}
        reasons = {run.key: reason_left_out(run, by_outcome=by_outcome) for run in present}
        parts = partition([key for key, reason in reasons.items() if reason is None], group_max) or [[]]
        outside = sorted(key for key, reason in reasons.items() if reason is not None)
        for part, keys in enumerate(parts):
            beside = [key for key in outside if order_of(key) % len(parts) == part]
            groups.append(
                Group(
                    group_id(policy, window_id, scenario_id, part),
                    policy,
                    window_id,
                    scenario_id,
                    part,
                    homogeneous=len({by_key[key].signature for key in keys}) == 1,
                    members=tuple(Member(key, reasons[key]) for key in [*keys, *beside]),
                )
            )
    return groups


def start_signature(run: Trajectory) -> str:
    """SHA-256 of how a run started: the first call's system messages and tools, and the environment of step 0."""
    first = run.calls[0] if run.calls else None
    system = [m for m in first.messages if m.get("role") in ("system", "developer")] if first else []
    tools = (first.call.tools or []) if first else []
    environment = run.steps[0].environment if run.steps and run.steps[0].step == 0 else {}
    return hashlib.sha256(json.dumps([system, tools, environment], sort_keys=True).encode()).hexdigest()


# scores -----------------------------------------------------------------------------------------
def scores_of_rewards(rewards: Mapping[RunKey, float | None]) -> dict[RunKey, float]:
    """Rewards as relative scores: (n - r) / (n - 1) with r the mean rank, 1 the best, equal rewards sharing theirs.

    No reward (None) ranks below every reward. Rewards that differ by rounding alone are equal.
    """
    n = len(rewards)
    worth = {key: -math.inf if reward is None else reward for key, reward in rewards.items()}
    ordered = sorted(worth, key=lambda key: (-worth[key], key))
    scores: dict[RunKey, float] = {}
    start = 0
    for end in range(1, n + 1):
        if end < n and _same(worth[ordered[end - 1]], worth[ordered[end]]):
            continue
        mean_rank = (start + 1 + end) / 2
        scores.update(dict.fromkeys(ordered[start:end], (n - mean_rank) / (n - 1) if n > 1 else 0.5))
        start = end
    return scores


def _same(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=TIE, abs_tol=TIE)


@dataclass(frozen=True)
class Verdict:
    """``tie`` has no spread and teaches nothing (invariant 7). Ranks count from 1, and equal scores share one."""

    state: Literal["scored", "tie"]
    spread: float
    ranks: dict[RunKey, int]


def verdict(scores: Mapping[RunKey, float]) -> Verdict:
    """spread = max - min; rank = 1 + how many scored better."""
    spread = max(scores.values()) - min(scores.values())
    ranks = {key: 1 + sum(other > score for other in scores.values()) for key, score in scores.items()}
    return Verdict("tie" if spread < TIE else "scored", spread, ranks)


def pause_s(attempts: int) -> float:
    """Seconds before a group whose judge has failed ``attempts`` times is taken up again: 30 doubling to an hour."""
    return min(3600.0, 30.0 * float(2 ** min(attempts - 1, 12)))
