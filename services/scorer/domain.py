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
TIMED_OUT = "truncated"
# How the SDK words the end of a run whose way to the model broke. A timeout is not among them: a policy may well have
# talked until its time was up, and such a run stays.
BROKEN_WAY = re.compile(
    r"(APIConnectionError|InternalServerError|RateLimitError|NatsError"
    r"|Connect(ion)?(Refused|Reset|Aborted)?Error|BrokenPipeError|RemoteProtocolError|ReadError|gaierror)\b"
)


@dataclass(frozen=True)
class Checks:
    """What the recorder's tables say of a run's record. ``steps_expected``: as its end said, or its last step says."""

    steps: int
    steps_expected: int
    without_call: int
    unanswered: int
    empty_prompts: int = 0


@dataclass(frozen=True)
class Run:
    """What is known of a run when its window is resolved. ``signature`` is None where its events are forgotten.

    ``broken`` says how infrastructure broke it.
    """

    agent_id: str
    trajectory_id: str
    policy: str
    scenario_id: str
    status: str
    late: bool
    called: bool
    rewarded: bool
    signature: str | None
    broken: str | None = None
    checks: Checks | None = None

    @property
    def key(self) -> RunKey:
        return (self.agent_id, self.trajectory_id)


@dataclass(frozen=True)
class Sampling:
    """Over ``target`` runs of a policy in a window, some are dropped before judging; a target of 0 drops none."""

    target: int = 0
    max_rate: float = 0.5
    seed: int = 0


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
    if run.broken is not None:
        return f"infrastructure broke it: {run.broken}"
    if run.checks is not None and (failed := failed_checks(run.checks, run.status)):
        return f"it fails the quality checks: {'; '.join(failed)}"
    if by_outcome and not run.rewarded and run.status not in UNREWARDED_IS_LAST:
        return "no reward of record"
    return None


def failed_checks(checks: Checks, status: str) -> list[str]:
    """Which quality checks a run's record fails, in words.

    A run that broke off or was cut off may well lack a step, a call or a result: that is its own doing and no fault of
    its record. A hole before its end, or an empty prompt, is a fault whatever became of it.
    """
    failed = []
    if checks.empty_prompts:
        failed.append(f"{checks.empty_prompts} of its calls have an empty prompt")
    if checks.steps != checks.steps_expected:
        failed.append(f"{checks.steps} of its {checks.steps_expected} steps are stored")
    if status == "completed":
        if not checks.steps:
            failed.append("it has no step")
        if checks.without_call:
            failed.append(f"{checks.without_call} of its steps have no model call")
        if checks.unanswered:
            failed.append(f"{checks.unanswered} of its actions have neither result nor error")
    return failed


def broken_by_infrastructure(run: Trajectory) -> str | None:
    """How the way to the model broke a run, or None. What the policy itself did, a timeout too, is not among it."""
    last_of_step = {call.step: call for call in run.calls}
    for number, call in sorted(last_of_step.items()):
        if (call.call.model_extra or {}).get("broken_off") is True:
            return f"the model's server broke off its reply in step {number}"
    error = (run.ended.model_extra or {}).get("error") if run.ended else None
    if run.ended and run.ended.status == "failed" and isinstance(error, str) and (found := BROKEN_WAY.match(error)):
        return f"it ended with {found[0]}"
    return None


def empty_prompts(run: Trajectory) -> int:
    return sum(call.reply is not None and not call.messages for call in run.calls)


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
    """All groups of a window: (policy, scenario), split where over ``group_max`` are to be judged.

    Who is left out stands in one of the parts, by its hash, and changes neither the number of parts nor their sizes.
    """
    reasons = {run.key: reason_left_out(run, by_outcome=by_outcome) for run in runs}
    reasons |= _reasons_dropped(window_id, runs, reasons, sampling)
    situations: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        situations.setdefault((run.policy, run.scenario_id), []).append(run)
    groups = []
    for (policy, scenario_id), present in sorted(situations.items()):
        by_key = {run.key: run for run in present}
        parts = partition([key for key in by_key if reasons[key] is None], group_max) or [[]]
        outside = sorted(key for key in by_key if reasons[key] is not None)
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


def _reasons_dropped(
    window_id: str, runs: Sequence[Run], reasons: Mapping[RunKey, str | None], sampling: Sampling
) -> dict[RunKey, str | None]:
    by_policy: dict[str, list[RunKey]] = {}
    for run in runs:
        if reasons[run.key] is None:
            by_policy.setdefault(run.policy, []).append(run.key)
    return {
        key: f"dropped at random: {len(keys)} runs are over the target of {sampling.target}"
        for policy, keys in by_policy.items()
        for key in dropped(keys, sampling, f"{window_id}\n{policy}")
    }


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
    scores: dict[RunKey, float]
    ranks: dict[RunKey, int]


def verdict(scores: Mapping[RunKey, float], statuses: Mapping[RunKey, str] | None = None) -> Verdict:
    """spread = max - min; rank = 1 + how many scored better.

    A run that timed out ranks last, whatever was said for it: beside runs that ended it scores 0.
    """
    late = {key for key in scores if (statuses or {}).get(key) == TIMED_OUT}
    late = late if len(late) < len(scores) else set()
    final = {key: 0.0 if key in late else score for key, score in scores.items()}
    spread = max(final.values()) - min(final.values())
    places = {key: (key not in late, score) for key, score in final.items()}
    ranks = {key: 1 + sum(other > place for other in places.values()) for key, place in places.items()}
    return Verdict("tie" if spread < TIE else "scored", spread, final, ranks)


def pause_s(attempts: int) -> float:
    """Seconds before a group whose judge has failed ``attempts`` times is taken up again: 30 doubling to an hour."""
    return min(3600.0, 30.0 * float(2 ** min(attempts - 1, 12)))
