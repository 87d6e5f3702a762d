"""Groups, starts, ranks and scores. Pure.

Source of the rules: design, invariants 7 (a group is one situation) and 9 (the reward of record); the idea of
scoring several attempts at one situation relative to each other is RULER's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from services.scorer.standing_domain import Judged, LeftOut, RanksLast, Run, Standing, standing
from shared.trajectories import RunKey, Trajectory

TIE = 1e-9  # a smaller difference is rounding, not merit
TIMED_OUT = "truncated"


@dataclass(frozen=True)
class Sampling:
    """Over ``target`` runs of a policy in a window, some are dropped before judging; a target of 0 drops none."""

    target: int = 0
    max_rate: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Member:
    """A run in its group. ``left_out`` says why it does not count, ``ranks_last`` why it is last and not judged."""

    key: RunKey
    left_out: str | None = None
    ranks_last: str | None = None

    @classmethod
    def of(cls, key: RunKey, found: Standing) -> Member:
        match found:
            case LeftOut(reason):
                return cls(key, left_out=reason)
            case RanksLast(reason):
                return cls(key, ranks_last=reason)
            case Judged():
                return cls(key)


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
    def counting(self) -> int:
        """Members that get a score."""
        return sum(member.left_out is None for member in self.members)


# grouping ---------------------------------------------------------------------------------------
def order_of(key: RunKey) -> int:
    """Where a run stands when a set is split: by a hash of its name, so that arrival plays no part."""
    return int.from_bytes(hashlib.sha256(f"{key[0]}\n{key[1]}".encode()).digest()[:8], "big")


def partition(keys: Sequence[RunKey], group_max: int) -> list[list[RunKey]]:
    """Split n runs into ceil(n / group_max) parts whose sizes differ by at most one, in order of their hashes."""
    ordered = sorted(keys, key=lambda key: (order_of(key), key))
    count = math.ceil(len(ordered) / group_max)
    edges = [part * len(ordered) // count for part in range(count + 1)] if count else [0]
    return [ordered[start:end] for start, end in pairwise(edges)]


def drop_rate(total: int, sampling: Sampling) -> float:
    """rate = min(max_rate, 1 - target / total), of the runs that would be judged; 0 at or under the target."""
    if sampling.target <= 0 or total <= sampling.target:
        return 0.0
    return min(sampling.max_rate, 1 - sampling.target / total)


def dropped(keys: Sequence[RunKey], sampling: Sampling, seed: str) -> set[RunKey]:
    """The floor(rate * n) runs whose hash under the seed is smallest: random, and the same for the same runs."""

    def point(key: RunKey) -> bytes:
        return hashlib.sha256(json.dumps([sampling.seed, seed, *key]).encode()).digest()

    count = math.floor(drop_rate(len(keys), sampling) * len(keys) + TIE)
    return set(sorted(keys, key=point)[:count])


def group_id(policy: str, window_id: str, scenario_id: str, part: int) -> str:
    """``<policy>-<window>-<16 hex digits>``: readable, safe in a URL, and the same whoever makes it."""
    text = json.dumps([policy, window_id, scenario_id, part])
    return f"{policy}-{re.sub(r'[^0-9A-Za-z]', '', window_id)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def form_groups(
    window_id: str, runs: Sequence[Run], *, group_max: int, by_outcome: bool, sampling: Sampling = Sampling()
) -> list[Group]:
    """All groups of a window: (policy, scenario), split where over ``group_max`` count.

    Who is left out stands in one of the parts, by its hash, and changes neither the number of parts nor their sizes.
    """
    stand = {run.key: standing(run, by_outcome=by_outcome) for run in runs}
    stand |= _dropped(window_id, [run for run in runs if not isinstance(stand[run.key], LeftOut)], sampling)
    situations: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        situations.setdefault((run.policy, run.scenario_id), []).append(run)
    groups = []
    for (policy, scenario_id), present in sorted(situations.items()):
        by_key = {run.key: run for run in present}
        outside = {key for key in by_key if isinstance(stand[key], LeftOut)}
        parts = partition([key for key in by_key if key not in outside], group_max) or [[]]
        for part, keys in enumerate(parts):
            beside = [key for key in sorted(outside) if order_of(key) % len(parts) == part]
            judged = [key for key in keys if isinstance(stand[key], Judged)]
            groups.append(
                Group(
                    group_id(policy, window_id, scenario_id, part),
                    policy,
                    window_id,
                    scenario_id,
                    part,
                    homogeneous=len({by_key[key].signature for key in judged or keys}) == 1,
                    members=tuple(Member.of(key, stand[key]) for key in [*keys, *beside]),
                )
            )
    return groups


def _dropped(window_id: str, runs: Sequence[Run], sampling: Sampling) -> dict[RunKey, Standing]:
    by_policy: dict[str, list[RunKey]] = {}
    for run in runs:
        by_policy.setdefault(run.policy, []).append(run.key)
    return {
        key: LeftOut(f"dropped at random: {len(keys)} runs are over the target of {sampling.target}")
        for policy, keys in by_policy.items()
        for key in dropped(keys, sampling, f"{window_id}\n{policy}")
    }


# starts -----------------------------------------------------------------------------------------
def start_signature(run: Trajectory) -> str:
    """SHA-256 of how a run started: what its model was first asked, with which tools, and what it saw first."""
    first = run.calls[0] if run.calls else None
    asked = [first.messages, first.call.tools or []] if first else []
    return _sha256([asked, _first_environment(run)])


def situation(run: Trajectory) -> str | None:
    """A name for what a run without ``scenario_id`` was set to do: its goal, the first user message, what it saw first.

    Runs that were set to do the same have the same; None where nothing of it was recorded.
    """
    messages = run.calls[0].messages if run.calls else []
    user = next((message.get("content") for message in messages if message.get("role") == "user"), None)
    told = [run.started.goal if run.started else None, user, _first_environment(run)]
    return f"unnamed-{_sha256(told)[:16]}" if any(told) else None


def _first_environment(run: Trajectory) -> dict[str, Any]:
    return run.steps[0].environment if run.steps else {}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    scores: dict[RunKey, float]
    ranks: dict[RunKey, int]


def verdict(
    scores: Mapping[RunKey, float], statuses: Mapping[RunKey, str] | None = None, last: Collection[RunKey] = ()
) -> Verdict:
    """spread = max - min; rank = 1 + how many stand better.

    A run that timed out ranks below those that ended, whatever was said for it, and who is in ``last`` below all. These
    k of n members score 0, and the scores s of the others become f + (1 - f) s with f = k / (n - 1): mean ranks among
    the others become those among all, and no way of breaking off scores as much as the worst that did not.
    """
    late = {key for key in scores if (statuses or {}).get(key) == TIMED_OUT}
    late = late if len(late) < len(scores) else set()
    members = len(scores) + len(last)
    floor = (len(late) + len(last)) / max(1, members - 1)
    final = {key: 0.0 if key in late else floor + (1 - floor) * score for key, score in scores.items()}
    final |= dict.fromkeys(last, 0.0)
    spread = max(final.values()) - min(final.values())
    places = {key: (1, key not in late, score) for key, score in scores.items()} | dict.fromkeys(last, (0, False, 0.0))
    ranks = {key: 1 + sum(other > place for other in places.values()) for key, place in places.items()}
    return Verdict("tie" if spread < TIE else "scored", spread, final, ranks)


def pause_s(attempts: int) -> float:
    """Seconds before a group whose judge has failed ``attempts`` times is taken up again: 30 doubling to an hour."""
    return min(3600.0, 30.0 * float(2 ** min(attempts - 1, 12)))
