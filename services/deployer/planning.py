"""Which shares a policy's versions have from which window on: the next route document. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from services.deployer.domain import Line, Version
from shared.errors import GiveUpError
from shared.routing import Arm, Plan, RouteDocument, Target
from shared.windows import window_at

Role = Literal["candidate", "anchor"]

KEPT_PLANS = 20
MAX_MARGIN_S = 5.0


@dataclass(frozen=True)
class Shares:
    canary: float
    base: float
    anchor: float


def arms(shares: Shares, best: str, candidate: str | None, base: str | None, previous: str | None) -> list[Arm]:
    """The shares of candidate, v0 and previous best, each for a version that has none yet; the best has the rest."""
    others: list[Arm] = []
    taken = {best}

    def give(version: str | None, share: float, role: Role) -> None:
        if version is not None and version not in taken and share > 0:
            others.append(Arm(version=version, share=share, role=role))
            taken.add(version)

    give(candidate, shares.canary, "candidate")
    give(base, shares.base, "anchor")
    give(previous, shares.anchor, "anchor")
    return [Arm(version=best, share=1 - sum(arm.share for arm in others), role="best"), *others]


def coming_window(now: datetime, window_s: int) -> datetime:
    """The first window start that every gateway will have heard of: a margin after now, a quarter window at most."""
    margin = timedelta(seconds=min(MAX_MARGIN_S, window_s / 4))
    return window_at(now + margin, window_s).ends_at


def next_document(
    last: RouteDocument | None,
    line: Line,
    *,
    shares: Shares,
    quarantined: Iterable[str],
    target_of: Callable[[Version], Target],
    now: datetime,
    window_s: int,
    salt: str,
) -> RouteDocument:
    """The document after ``last`` (itself where nothing changes); a policy's first one is in force from now on.

    Raises GiveUpError where no version is promoted: there is nobody to answer.
    """
    if line.best is None:
        raise GiveUpError("no version is promoted; there is nothing to route to")
    names = [None if d is None else d.version for d in (line.candidate, line.base, line.previous)]
    wanted = arms(shares, line.best.version, *names)
    plans = list(last.plans) if last else []
    if not plans or plans[-1].arms != wanted:
        plan = Plan(effective_from=coming_window(now, window_s), arms=wanted)
        if not plans:
            plan.effective_from = window_at(now, window_s).starts_at
        elif plan.effective_from <= plans[-1].effective_from:  # the one before has not begun, and never will
            plan.effective_from = plans.pop().effective_from
        plans = [*plans, plan][-KEPT_PLANS:]
    routed = {arm.version for plan in plans for arm in plan.arms}
    targets = {d.version: target_of(d) for d in line.deployments if d.version in routed}
    made = RouteDocument(
        policy=line.best.policy,
        revision=last.revision if last else 0,
        salt=last.salt if last else salt,
        plans=plans,
        targets=targets,
        quarantined=sorted(routed & set(quarantined) - {line.best.version}),
    )
    return made if made == last else made.model_copy(update={"revision": made.revision + 1})


def in_use(document: RouteDocument, now: datetime, run_s: float) -> set[str]:
    """Versions that may still be asked: of the plan in force, of those to come, and of those that just ended.

    A run follows the plan that its window began with, and may go on for ``run_s`` after that plan has ended.
    """
    ends = [*(plan.effective_from for plan in document.plans[1:]), None]
    over = now - timedelta(seconds=run_s)
    asked = [plan for plan, end in zip(document.plans, ends, strict=True) if end is None or end > over]
    return {arm.version for plan in asked for arm in plan.arms} - set(document.quarantined)
