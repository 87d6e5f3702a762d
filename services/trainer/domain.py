"""What may be trained on, how strongly, and when there is enough of it. Pure rules; nothing here knows torch or SQL."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from services.trainer.reading_domain import CallRecord as CallRecord
from services.trainer.reading_domain import Reading
from services.trainer.reading_domain import departures as departures

Label = Literal["exact", "stale", "imitation", "mixed"]
Method = Literal["grpo", "imitation"]

ADVANTAGE_EPSILON = 1e-4


# what is judged ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judged:
    """A member of a scored group: its score from the judge, its reward of record from the world, what it can carry.

    ``barred`` says why it is left out for good: training found that it cannot be used.
    """

    agent_id: str
    trajectory_id: str
    score: float
    reward: float | None
    reading: Reading
    barred: str | None = None


@dataclass(frozen=True)
class ScoredGroup:
    group_id: str
    revision: int
    homogeneous: bool
    members: tuple[Judged, ...]
    window_id: str = ""
    quality: float | None = None  # of its window, as the recorder measured it

    def has_spread(self) -> bool:
        scores = [member.score for member in self.members]
        return bool(scores) and max(scores) > min(scores)


# what a member can honestly carry (invariant 6) ---------------------------------------------------
@dataclass(frozen=True)
class ByGradient:
    """Trainable with the policy gradient: ``exact``, or ``stale`` within the lag."""

    label: Label


@dataclass(frozen=True)
class ByImitation:
    label: Label = "imitation"


@dataclass(frozen=True)
class NotYet:
    """Not trainable as things stand; a fact that is missing may still come."""

    label: Label
    reason: str


@dataclass(frozen=True)
class Never:
    """Not trainable, and nothing will change that."""

    label: Label
    reason: str


Carries = ByGradient | ByImitation | NotYet | Never


@dataclass(frozen=True)
class Terms:
    """What a batch asks for. ``numbers`` maps each version of the line to its number, ``quarantined`` to its reason.

    ``endpoints``: the versions of the line that have no weights here, a paid model for instance.
    """

    parent: str
    numbers: Mapping[str, int]
    max_lag: int = 1
    imitation_min_reward: float = 1.0
    min_groups: int = 8
    min_agents: int = 2
    quarantined: Mapping[str, str] = field(default_factory=dict)
    trust_agent_tokens: bool = False
    min_quality: float = 0.0
    endpoints: frozenset[str] = frozenset()

    @property
    def for_student(self) -> bool:
        """Whether the parent has no weights: what is trained then is the policy's student, from words alone."""
        return self.parent in self.endpoints


UNWITNESSED = "the gateway did not see all its calls: route them through it, or set RATCHET_TRUST_AGENT_TOKENS"


def carries(member: Judged, group: ScoredGroup, terms: Terms) -> Carries:
    """The label of a member and whether it can be trained on.

    - ``exact``: every answered call was witnessed, has prompt ids, reply ids and their finite logprobs, was sampled
      from the model's own distribution at a temperature above 0, and was answered by the parent.
    - ``stale``: the same, answered by other versions of the line; trained on up to ``max_lag`` versions away.
    - ``imitation``: tokens of use are lacking, and each reply was recorded. Only what an outcome calls good in itself
      (reward of record >= imitation_min_reward), and only from a group with spread. Whether its members started alike
      is no condition: no member is compared with another.
    - ``mixed``: anything else. Nothing of it.

    An endpoint's tokens are of no use, whatever it gives: their vocabulary is its own. While it is the parent, words
    are imitated, its own and others'; once a version with weights is, what it answers teaches that no more.
    Nothing that a quarantined version answered is trained on; what is of a window under ``min_quality`` waits.
    """
    reading = member.reading
    if member.barred is not None:
        return Never("mixed", member.barred)
    if fallen := sorted(version for version in reading.versions if version in terms.quarantined if version):
        return Never("mixed", f"{fallen[0]} is quarantined: {terms.quarantined[fallen[0]]}"[:300])
    if group.quality is not None and group.quality < terms.min_quality:
        return NotYet("mixed", f"its window's quality {group.quality:.3f} is under {terms.min_quality:g}")
    elsewhere = next((version for version in sorted(terms.endpoints) if version in reading.versions), None)
    if elsewhere is not None and not terms.for_student:
        return NotYet("imitation", f"{elsewhere} answered it, an endpoint that {terms.parent} has taken over from")
    trusted = reading.witnessed or terms.trust_agent_tokens
    why = f"the tokens of {elsewhere} are of another vocabulary" if elsewhere is not None else reading.no_gradient
    why = why or (None if trusted else UNWITNESSED)
    if why is None:
        return _teaches_student(member, group, terms) if terms.for_student else _carries_gradient(reading, terms)
    if reading.no_imitation is not None:
        return Never("mixed", reading.no_imitation)
    match _carries_imitation(member, group, terms):
        case NotYet(_, reason) if reading.has_tokens:
            return NotYet("mixed", f"{why}; to be imitated, {reason}")
        case Never(_, reason) if reading.has_tokens:
            return Never("mixed", f"{why}; to be imitated, {reason}")
        case found:
            return found


def _carries_gradient(reading: Reading, terms: Terms) -> Carries:
    versions = reading.versions
    if versions == {terms.parent}:
        return ByGradient("exact")
    if stranger := _stranger(reading, terms):
        return stranger
    lag = max(abs(terms.numbers[version] - terms.numbers[terms.parent]) for version in versions if version)
    if lag > terms.max_lag:
        return Never("stale", f"it is {lag} versions away from {terms.parent}, over max_lag {terms.max_lag}")
    return ByGradient("stale")


def _stranger(reading: Reading, terms: Terms) -> Never | None:
    strangers = sorted(str(version) for version in reading.versions if version not in terms.numbers)
    return Never("mixed", f"{strangers[0][:60]} is no version of this line") if strangers else None


def _teaches_student(member: Judged, group: ScoredGroup, terms: Terms) -> Carries:
    """A run with tokens of use that a version of ours answered, on its trial for instance, while an endpoint is best.

    Its words are imitated where they are good. Where not, nothing is over: its tokens count once its version is best.
    """
    reading = member.reading
    if stranger := _stranger(reading, terms):
        return stranger
    found = Never("mixed", reading.no_imitation) if reading.no_imitation else _carries_imitation(member, group, terms)
    match found:
        case NotYet(_, reason) | Never(_, reason):
            own = max(str(version) for version in reading.versions)
            why = f"{own} answered it, whose tokens can be trained on once it is best; to be imitated, {reason}"
            return NotYet("stale", why)
        case _:
            return found


def _carries_imitation(member: Judged, group: ScoredGroup, terms: Terms) -> Carries:
    if not group.has_spread():
        return Never("imitation", "its group has no spread")
    if member.reward is None:
        return NotYet("imitation", "it has no reward of record")
    if member.reward < terms.imitation_min_reward:
        return Never("imitation", f"its reward of record {member.reward:g} is under {terms.imitation_min_reward:g}")
    return ByImitation()


# advantages ---------------------------------------------------------------------------------------
def advantages(scores: Sequence[float], homogeneous: bool) -> list[float]:
    """How much better than its group each member did.

    - started alike: A_i = (s_i - mean(s)) / (std(s) + eps), std over the whole group (GRPO, arXiv:2402.03300)
    - otherwise leave-one-out, not scaled: A_i = s_i - mean of the others (RLOO, arXiv:2402.14740); scaling would
      turn a lucky start into a full step

    A group without spread teaches nothing: all zeros.
    """
    n = len(scores)
    if n < 2 or max(scores) == min(scores):
        return [0.0] * n
    mean = sum(scores) / n
    if homogeneous:
        std = math.sqrt(sum((score - mean) ** 2 for score in scores) / n)
        return [(score - mean) / (std + ADVANTAGE_EPSILON) for score in scores]
    return [score - (sum(scores) - score) / (n - 1) for score in scores]


# readiness ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gate:
    """Where a policy's line stands. Each of ``undecided``, ``running`` and ``untried``, where set, holds one back.

    So does ``no_student``: the parent is an endpoint, and nothing is registered that could learn from it.
    """

    policy: str
    parent: str | None
    undecided: str | None = None
    running: str | None = None
    untried: str | None = None
    no_student: bool = False


@dataclass(frozen=True)
class Failures:
    """Batches of a policy that failed since one was trained: how many, the last with its reason, and when it did."""

    in_a_row: int
    batch_id: str
    reason: str
    at: datetime

    def again_at(self, retry_s: float) -> datetime:
        """When the next batch is made by itself: ``retry_s`` later, doubled by each failure, an hour at most."""
        return self.at + timedelta(seconds=min(3600.0, retry_s * 2.0 ** min(self.in_a_row - 1, 20)))


def holds(gate: Gate) -> list[str]:
    """Why no batch may be made now, in words; empty where one may."""
    reasons = []
    if gate.parent is None:
        reasons.append("no version has been promoted yet")
    if gate.no_student:
        said = f"{gate.parent} is an endpoint and has no weights to train: register a student with"
        reasons.append(f"{said} `ratchet base register DIR --policy {gate.policy}`")
    if gate.running is not None:
        reasons.append(f"batch {gate.running} is being trained")
    if gate.untried is not None:
        reasons.append(f"{gate.untried} is trained and not yet on trial")
    if gate.undecided is not None:
        reasons.append(f"{gate.undecided} is on trial and undecided")
    return reasons


@dataclass(frozen=True)
class Entry:
    """A row of ``batch_trajectories``; ``left_out`` says why it is not trained on, None where it is."""

    agent_id: str
    trajectory_id: str
    group_id: str
    revision: int
    label: Label
    advantage: float
    left_out: str | None


@dataclass(frozen=True)
class Ready:
    method: Method
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Empty:
    """Enough groups are there, and nothing in them can ever be trained on: recorded, so as not to be asked again."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Wait:
    missing: tuple[str, ...]


Plan = Ready | Empty | Wait


def plan(groups: Sequence[ScoredGroup], terms: Terms) -> Plan:
    """What to make of the groups that no batch holds yet.

    GRPO where at least ``min_groups`` groups have a member trainable by gradient, else imitation where as many
    have one worth imitating; from an endpoint a student imitates, and nothing else. A batch takes the groups that it
    can train on, whole, and those in which nothing can ever be trained; groups for the other method, or that a reward
    may yet decide, stay for a later batch.
    """
    verdicts = [(group, [carries(member, group, terms) for member in group.members]) for group in groups]
    by_method: dict[Method, list[tuple[ScoredGroup, list[Carries]]]] = {
        "grpo": [item for item in verdicts if any(isinstance(v, ByGradient) for v in item[1])],
        "imitation": [item for item in verdicts if any(isinstance(v, ByImitation) for v in item[1])],
    }
    if terms.for_student:
        del by_method["grpo"]
    hopeless = [item for item in verdicts if all(isinstance(verdict, Never) for verdict in item[1])]
    missing = []
    for method, usable in by_method.items():
        agents = len({entry.agent_id for entry in _entries(usable, method) if entry.left_out is None})
        if len(usable) >= terms.min_groups and agents >= terms.min_agents:
            return Ready(method, (*_entries(usable, method), *_entries(hopeless, method)))
        if len(usable) < terms.min_groups:
            missing.append(f"{method}: {len(usable)} of {terms.min_groups} groups")
        else:
            missing.append(f"{method}: {agents} of {terms.min_agents} agents")
    if len(hopeless) >= terms.min_groups:
        return Empty(_entries(hopeless, "grpo"))
    return Wait(tuple(missing))


def _entries(items: Sequence[tuple[ScoredGroup, list[Carries]]], method: Method) -> tuple[Entry, ...]:
    found = []
    for group, verdicts in items:
        strength = advantages([member.score for member in group.members], group.homogeneous)
        for member, verdict, advantage in zip(group.members, verdicts, strength, strict=True):
            found.append(
                Entry(
                    member.agent_id,
                    member.trajectory_id,
                    group.group_id,
                    group.revision,
                    verdict.label,
                    advantage,
                    _why_left_out(verdict, method),
                )
            )
    return tuple(found)


def _why_left_out(verdict: Carries, method: Method) -> str | None:
    match verdict:
        case ByGradient():
            return None if method == "grpo" else "the batch imitates"
        case ByImitation():
            return None if method == "imitation" else "the batch trains by gradient"
        case NotYet(_, reason) | Never(_, reason):
            return reason


def drop_out(entries: Sequence[Entry], rate: float, seed: str) -> tuple[Entry, ...]:
    """Leave out a share of what would be trained, drawn from the seed and each run's own name; one always stays."""

    def point(entry: Entry) -> float:
        text = f"{seed}\n{entry.agent_id}\n{entry.trajectory_id}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    trained = sorted((entry for entry in entries if entry.left_out is None), key=point)
    dropped = {id(entry) for entry in trained[:-1] if point(entry) < rate}
    return tuple(replace(entry, left_out="dropout") if id(entry) in dropped else entry for entry in entries)


def next_version(number: int) -> str:
    return f"v{number}"
