"""Rules of the rollout: what stands where, what a run counts for, what a window says. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any, Literal

from shared.events import GatewayHealth, ModelDeployed, ModelRolledBack
from shared.routing import Plan, RouteDocument, assigned

State = Literal["verifying", "canary", "promoted", "superseded", "rolled_back", "refused", "held"]

HEALTH_REQUESTS = 20
FELL = ("rolled_back", "refused", "held")


@dataclass(frozen=True, kw_only=True)
class Version:
    """What answers: an artifact, whole or an adapter over another one; or, in ``serving``, an endpoint of its own."""

    policy: str
    version: str
    number: int
    artifact_sha256: str | None
    adapter_of: str | None = None
    serving: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Deployment(Version):
    """A version of a policy and where it stands."""

    parent: str | None
    method: str
    state: State
    control: str | None
    reason: str | None
    evidence: dict[str, Any]
    decision: int
    created_at: datetime
    effective_from: datetime | None
    deadline_at: datetime | None
    decided_at: datetime | None


@dataclass(frozen=True)
class Line:
    """All deployments of one policy."""

    deployments: tuple[Deployment, ...]

    def get(self, version: str) -> Deployment | None:
        return next((d for d in self.deployments if d.version == version), None)

    @property
    def best(self) -> Deployment | None:
        return next((d for d in self.deployments if d.state == "promoted"), None)

    @property
    def candidate(self) -> Deployment | None:
        return next((d for d in self.deployments if d.state == "canary"), None)

    @property
    def base(self) -> Deployment | None:
        """v0, unless it was refused or rolled back."""
        return next((d for d in self.deployments if d.number == 0 and d.state in ("promoted", "superseded")), None)

    @property
    def previous(self) -> Deployment | None:
        """The version that was promoted before the present best, and was never rolled back."""
        former = [d for d in self.deployments if d.state == "superseded" and d.decided_at]
        return max(former, key=lambda d: (d.decided_at, d.number), default=None)

    def why_held(self, version: Deployment) -> str | None:
        """Why a version is not tried: what it was trained from fell. None where nothing speaks against it."""
        parent = self.get(version.parent) if version.parent else None
        if parent is None or parent.state not in FELL:
            return None
        said = f" ({parent.reason})" if parent.reason else ""
        return f"its parent {parent.version} was {parent.state.replace('_', ' ')}{said}"


# What a window says ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutedRun:
    """A run that started in the window; ``answered_by`` holds every version that answered one of its calls."""

    agent_id: str
    trajectory_id: str
    scenario_id: str
    status: str
    reward: float | None
    answered_by: frozenset[str]


@dataclass(frozen=True)
class Assignment:
    """What a run counts for: ``counted`` is its reward of record, or the window's worst for the reason ``penalty``."""

    run: RoutedRun
    version: str
    counted: float | None
    penalty: str | None


def assignment(run: RoutedRun, version: str, worst: float | None) -> Assignment:
    """Invariant 9: every started run that was answered at all counts for the version it was assigned.

    A run that another version answered even once, that has no reward of record, or that has neither end nor
    reward counts as ``worst``: the lowest reward of record among all runs of the policy in the window. Where
    the world rewarded no run at all, nothing counts: that is the world's failure and no version's.
    """
    if run.answered_by - {version}:
        return Assignment(run, version, worst, "fallback")
    if run.reward is not None:
        return Assignment(run, version, run.reward, None)
    return Assignment(run, version, worst, "no reward" if run.status == "completed" else "no end")


def assignments(
    runs: Iterable[RoutedRun], document: RouteDocument, window_start: datetime, worst: float | None
) -> list[Assignment]:
    return [assignment(run, assigned(document, run.agent_id, window_start), worst) for run in runs]


@dataclass(frozen=True)
class Comparison:
    """``difference`` = ``mean`` - ``control_mean``, each a mean over the scenarios that both versions met."""

    version: str
    control: str
    runs: int
    control_runs: int
    mean: float
    control_mean: float

    @property
    def difference(self) -> float:
        return self.mean - self.control_mean


def compared(counted: Sequence[Assignment], version: str, control: str) -> Comparison | None:
    """Version against control, scenario by scenario, so that the world's noise they share falls out.

    Each scenario that both met weighs the same. None where there is none: no traffic is no evidence.
    """
    arms: dict[str, dict[str, list[float]]] = {version: {}, control: {}}
    for one in counted:
        if one.version in arms and one.counted is not None:
            arms[one.version].setdefault(one.run.scenario_id, []).append(one.counted)
    shared = sorted(arms[version].keys() & arms[control].keys())
    if not shared:
        return None
    return Comparison(
        version,
        control,
        sum(len(arms[version][scenario]) for scenario in shared),
        sum(len(arms[control][scenario]) for scenario in shared),
        fmean(fmean(arms[version][scenario]) for scenario in shared),
        fmean(fmean(arms[control][scenario]) for scenario in shared),
    )


def pairs(plan: Plan) -> list[tuple[str, str]]:
    """What a plan lets one compare: the candidate with the best, and the best with each anchor (v0 among them)."""
    by_role = {role: [a.version for a in plan.arms if a.role == role] for role in ("best", "candidate", "anchor")}
    return [
        *((candidate, best) for candidate in by_role["candidate"] for best in by_role["best"]),
        *((best, anchor) for best in by_role["best"] for anchor in by_role["anchor"]),
    ]


# Health ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What the gateways reported of a candidate and of its control since the last judgment of both."""

    requests: int = 0
    bad: int = 0
    control_requests: int = 0
    control_bad: int = 0

    def plus(self, report: GatewayHealth, *, control: bool) -> Tally:
        bad = report.failures + report.fallbacks
        if control:
            return replace(
                self,
                control_requests=self.control_requests + report.requests,
                control_bad=self.control_bad + bad,
            )
        return replace(self, requests=self.requests + report.requests, bad=self.bad + bad)

    @property
    def due(self) -> bool:
        return self.requests >= HEALTH_REQUESTS

    @property
    def broken(self) -> bool:
        """The candidate fails more than half of 20 requests or more, while its control does not fail likewise.

        Where both fail it is the whole endpoint that is away: infrastructure, and no word about the candidate.
        """
        return self.due and self.bad * 2 > self.requests and self.control_bad * 2 <= self.control_requests


# Announcements -----------------------------------------------------------------------------------


def announcement(row: Deployment) -> ModelDeployed | ModelRolledBack:
    """The event of a decided deployment. What was refused or held ends as what was rolled back: nobody waits for it."""
    evidence = {name: value for name, value in row.evidence.items() if name != "health"}
    if row.state in ("promoted", "superseded"):
        return ModelDeployed(
            policy=row.policy,
            version=row.version,
            previous=row.control,
            reason=row.reason or "",
            evidence=evidence,
            decision=row.decision,
        )
    return ModelRolledBack(
        policy=row.policy,
        version=row.version,
        back_to=row.control,
        reason=row.reason or "",
        evidence=evidence,
        decision=row.decision,
    )


def patience_is_over(row: Deployment, now: datetime, patience_s: float) -> bool:
    return now - row.created_at > timedelta(seconds=patience_s)
