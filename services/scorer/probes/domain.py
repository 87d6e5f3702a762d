"""Planted cases for a judge: what each expects, what its scores make of them, and when it is to be probed. Pure.

Why: language models as judges are fooled by trivial text (arXiv:2507.08794), and relative scores are the whole
training signal. The margins are ours: a judge that orders two attempts by less than ``MARGIN`` has not told them apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ratchet_sdk.events import Action, LlmCall, Model, Step, TrajectoryEnded, TrajectoryStarted

from shared.trajectories import RunKey, Trajectory, assemble

MARGIN = 0.1  # "a > b": by so much at least
TOLERANCE = 0.2  # "a = b": by no more than this
Verdict = Literal["passed", "failed", "unfinished"]


class _Planted(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Situation(_Planted):
    system: str
    user: str


class Attempt(_Planted):
    """``fact`` is a later fact about the run: hindsight, for the judge alone."""

    says: str
    action: Action | None = None
    status: Literal["completed", "failed", "truncated"] = "completed"
    fact: dict[str, Any] | None = None


@dataclass(frozen=True)
class Expectation:
    one: str
    relation: Literal[">", "="]
    other: str

    def __str__(self) -> str:
        return f"{self.one} {self.relation} {self.other}"

    def holds(self, scores: Mapping[str, float]) -> bool:
        difference = scores[self.one] - scores[self.other]
        return difference >= MARGIN - 1e-9 if self.relation == ">" else abs(difference) <= TOLERANCE + 1e-9


class ProbeCase(_Planted):
    name: str = Field(pattern=r"^[a-z0-9-]{1,40}$")
    about: str
    situation: str
    facts: dict[str, Any] = Field(default_factory=dict)
    attempts: dict[str, Attempt] = Field(min_length=2, max_length=8)
    expect: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _expects_what_is_there(self) -> ProbeCase:
        if strangers := {name for e in self.expectations for name in (e.one, e.other)} - self.attempts.keys():
            raise ValueError(f"{self.name} expects something of {sorted(strangers)}, which it does not hold")
        return self

    @property
    def expectations(self) -> list[Expectation]:
        return [expectation(text) for text in self.expect]

    def keys(self) -> dict[str, RunKey]:
        """Each attempt as the run of an agent; the names say nothing about which is better."""
        return {name: (f"probe-{place}", self.name) for place, name in enumerate(self.attempts)}


class Suite(_Planted):
    situations: dict[str, Situation]
    cases: list[ProbeCase] = Field(min_length=1)

    @model_validator(mode="after")
    def _holds_together(self) -> Suite:
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError("two cases have one name")
        if lost := {case.situation for case in self.cases} - self.situations.keys():
            raise ValueError(f"no situation is called {sorted(lost)}")
        return self

    @property
    def version(self) -> str:
        """What makes two suites one, as 16 hex digits: everything in them."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def expectation(text: str) -> Expectation:
    """``a > b`` or ``a = b``. Raises ValueError."""
    found = re.fullmatch(r"([\w-]+) ([>=]) ([\w-]+)", text)
    if found is None or found[1] == found[3]:
        raise ValueError(f"{text!r} is no expectation; write 'a > b' or 'a = b'")
    return Expectation(found[1], ">" if found[2] == ">" else "=", found[3])


def trajectory(key: RunKey, attempt: Attempt, situation: Situation, at: datetime) -> Trajectory:
    """An attempt as a run put together from events, as every run is that a judge sees."""
    agent_id, trajectory_id = key
    head = {"trajectory_id": trajectory_id, "started_at": at, "occurred_at": at}
    call = LlmCall(
        call_id=f"{agent_id}-1",
        messages=[{"role": "system", "content": situation.system}, {"role": "user", "content": situation.user}],
        response={"index": 0, "message": {"role": "assistant", "content": attempt.says}, "finish_reason": "stop"},
    )
    ended: dict[str, Any] = {"status": attempt.status, "step_count": 1}
    events = [
        TrajectoryStarted(**head, model=Model(name="probe")),
        Step(**head, step=0, llm_calls=[call], action=attempt.action),
        TrajectoryEnded(**head, **ended),
    ]
    return assemble(agent_id, trajectory_id, [event.model_dump_json(by_alias=True).encode() for event in events])


# what a judge made of it ----------------------------------------------------------------------------
@dataclass(frozen=True)
class CaseResult:
    """``state``: ``unanswered`` where the judge gave no judgment, which is a failure of it and no verdict on it."""

    name: str
    state: Literal["passed", "failed", "unanswered"]
    broken: tuple[str, ...] = ()
    scores: Mapping[str, float] | None = None
    fault: str | None = None


def result(case: ProbeCase, scores: Mapping[RunKey, float]) -> CaseResult:
    """Passed where every expectation holds, else with those that do not."""
    named = {name: scores[key] for name, key in case.keys().items()}
    broken = tuple(str(expected) for expected in case.expectations if not expected.holds(named))
    return CaseResult(case.name, "failed" if broken else "passed", broken, named)


def verdict(results: Sequence[CaseResult], pass_mark: float) -> Verdict:
    """``passed`` where ``pass_mark`` of all cases passed; ``unfinished`` where those unanswered could decide."""
    passed = sum(found.state == "passed" for found in results)
    unanswered = sum(found.state == "unanswered" for found in results)
    needed = pass_mark * len(results) - 1e-9
    if passed >= needed:
        return "passed"
    return "unfinished" if passed + unanswered >= needed else "failed"


# when to probe --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probed:
    """The newest probe of a judge."""

    suite: str
    state: Literal["running", "passed", "failed", "unfinished"]
    at: datetime  # when it ended, or when a running one was last heard of


@dataclass(frozen=True)
class When:
    """A verdict holds for ``every``; what came to none is tried for ``again``; who is silent for ``lost`` is gone."""

    every: timedelta
    lost: timedelta
    again: timedelta = timedelta(minutes=10)

    @classmethod
    def of_seconds(cls, *, every: float, lost: float) -> When:
        return cls(timedelta(seconds=every), timedelta(seconds=lost))


def due(newest: Probed | None, suite: str, now: datetime, when: When, *, by_hand: bool) -> bool:
    """Whether a judge is to be probed now: by hand always, unless one is running already."""
    if newest is None:
        return True
    age = now - newest.at
    if newest.state == "running":
        return age >= when.lost
    if newest.state == "unfinished":
        return by_hand or age >= when.again
    return by_hand or newest.suite != suite or age >= when.every


# whom ------------------------------------------------------------------------------------------------
def address(base_url: str) -> str:
    """An endpoint's URL as it may be stored and shown: without user, password and query."""
    if not base_url:
        return ""
    parts = urlsplit(base_url)
    host = f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
