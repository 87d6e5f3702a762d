"""When a trial ends: promoted, rolled back, or out of time and what it lacked. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.deployer.sequential import Interval, interval

Reason = Literal["worse", "deadline", "broken endpoint", "operator"]


@dataclass(frozen=True)
class Promote:
    evidence: Interval


@dataclass(frozen=True)
class Hold:
    evidence: Interval


@dataclass(frozen=True)
class RollBack:
    reason: Reason
    evidence: Interval | None = None

    @property
    def quarantines(self) -> bool:
        """Whether the version answers nothing from now on, rather than from the next window on."""
        return self.reason != "deadline"


Verdict = Promote | Hold | RollBack


def decide(
    differences: Sequence[float], *, alpha: float, min_windows: int, deadline_windows: int, over: bool = False
) -> Verdict:
    """Invariant 10, on the window differences since the canary began. It may be asked after every window.

    Promote when the confidence sequence lies above zero, roll back when it lies below, or at the deadline: after
    ``deadline_windows`` of evidence, or when its time by the clock is ``over``, however little was seen until then.
    Windows without runs of both versions are not among the differences: they count towards nothing.
    """
    found = interval(differences, alpha)
    if found.n >= min_windows and found.lower > 0:
        return Promote(found)
    if found.upper < 0:
        return RollBack("worse", found)
    if over or found.n >= deadline_windows:
        return RollBack("deadline", found)
    return Hold(found)


@dataclass(frozen=True)
class Met:
    """What a trial has met since it began: settled windows, and runs of the policy in them.

    ``unrouted`` were answered by no version of it; ``shared``: scenarios of a window that both versions met.
    """

    windows: int
    runs: int
    control_runs: int
    unrouted: int
    shared: int


def lacking(met: Met, evidence: int) -> str:
    """Why a trial's time went by without a verdict, in words; ``evidence`` in windows."""
    match met:
        case _ if evidence:
            return f"no verdict from {evidence} window{'s' if evidence != 1 else ''} of evidence"
        case Met(shared=shared) if shared:
            return "no reward: the world said nothing of runs that both versions had"
        case Met(runs=runs, control_runs=others) if runs and others:
            return "no shared scenario: no situation was met by both versions in one window"
        case Met(runs=runs) if runs:
            return "no control: none of the runs was its control's"
        case Met(control_runs=others) if others:
            return "no traffic: none of the runs was its own"
        case Met(unrouted=unrouted) if unrouted:
            said = "1 run was" if unrouted == 1 else f"{unrouted} runs were"
            return (
                f"no traffic: {said} answered by no version; agents ask the gateway for the model named as the policy"
            )
        case Met(windows=0):
            return "no window was settled"
        case _:
            return "no traffic"


def summary(evidence: Interval | None, alpha: float) -> dict[str, Any]:
    """Evidence as JSON; a bound that is not known yet is null."""
    if evidence is None:
        return {}
    bounds = {"lower": evidence.lower, "upper": evidence.upper}
    finite = {name: bound if math.isfinite(bound) else None for name, bound in bounds.items()}
    return {"n": evidence.n, "mean": evidence.mean, **finite, "alpha": alpha}
