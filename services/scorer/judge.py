"""What a judge is: a case in, a ruling out. The words that scorer, judges and stores share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from shared.errors import RetryLaterError
from shared.trajectories import RunKey


@dataclass(frozen=True)
class Case:
    """A group that is to be judged: its members with their status, and the window that it lies in.

    ``last``: members that rank last, each with its reason; the judge is not asked about them.
    ``revision`` is that of the judgment to be made. ``judge`` and ``rubric`` are named where an operator asked for a
    judgment by them; None leaves it to the settings.
    """

    group_id: str
    policy: str
    window_id: str
    scenario_id: str
    starts_at: datetime
    ends_at: datetime
    attempts: int
    members: dict[RunKey, str]
    revision: int = 1
    judge: str | None = None
    rubric: str | None = None
    last: Mapping[RunKey, str] = field(default_factory=dict)

    def to_be_judged(self) -> Case:
        """The case as a judge sees it."""
        members = {key: status for key, status in self.members.items() if key not in self.last}
        return replace(self, members=members, last={})


@dataclass(frozen=True)
class Hindsight:
    """What the agents could not know: the window's facts, what was revealed, and what became of each run."""

    window: dict[str, Any]
    knowledge: list[dict[str, Any]]
    runs: dict[RunKey, list[dict[str, Any]]]


@dataclass(frozen=True)
class Opinion:
    """0 <= score <= 1, relative to the other members of the group."""

    score: float
    explanation: str | None = None
    strengths: tuple[str, ...] = ()
    weaknesses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """One question to a model and its answer. ``places``: where each member was shown, from 1; identical ones share it.

    ``endpoint``: the address that answered, without user and password.
    ``hindsight`` is False for a look that only calibrates the judge and counts for no score. Tokens are those of the
    answer; ``cost_usd`` is what this look was paid, 0 where the answer was remembered, None where no price is known.
    """

    number: int
    hindsight: bool
    places: Mapping[RunKey, int]
    opinions: Mapping[RunKey, Opinion]
    endpoint: str
    content_sha256: bytes
    hindsight_sha256: bytes | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    latency_ms: float
    remembered: bool


@dataclass(frozen=True)
class Ruling:
    """One opinion for each member of the case, under a rubric. A judge that looks several times tells each look.

    ``disagreement``: mean absolute difference of a member's scores between looks; None for a single look.
    """

    opinions: Mapping[RunKey, Opinion]
    rubric: str
    looks: tuple[Look, ...] = ()
    disagreement: float | None = None


class JudgeFailedError(RetryLaterError):
    """The judge gave no usable judgment: its failure and never a score (invariant 12). ``after_s``: not before."""

    def __init__(self, text: str, after_s: float | None = None) -> None:
        super().__init__(text)
        self.after_s = after_s


class JudgeWaitsError(RetryLaterError):
    """The judge may not be asked now, which is no failure of its: ``reason`` is what the group waits for."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Judge(Protocol):
    """Ranks the members of one group. ``rubrics``: the names of those that it can be asked to judge by."""

    name: str
    model: str | None
    rubrics: Collection[str]

    async def judge(self, case: Case) -> Ruling:
        """One opinion for each member of the case. Raises JudgeFailedError, JudgeWaitsError."""
