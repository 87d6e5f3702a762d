"""How good the judge is: its order against the reward of record, as metrics. In SQL: the view ``judge_calibration``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Gauge

from services.scorer.looks_domain import Pairs, tau_b
from services.scorer.looks_store import WindowPairs

# ``view`` is without_hindsight, or with_hindsight_circular: a judge that has been shown the outcome agrees with it.
TAU = Gauge(
    "ratchet_judge_tau",
    "Kendall's tau-b of the judge's order with the reward of record, the same on every replica",
    ["view", "span"],
)
PAIRS = Gauge("ratchet_judge_tau_pairs", "Pairs of runs that tau is taken over", ["view", "span"])
DRIFT = Gauge("ratchet_judge_tau_drift", "How far rolling tau lies below that of as many windows before; no hindsight")
DRIFT_MAX = Gauge("ratchet_judge_tau_drift_max", "The drift from which an alert is due")
BLIND = "without_hindsight"


class Found(Protocol):
    async def newest(self, judge: str, windows: int) -> list[WindowPairs]:
        """Pairs of the newest sampled windows, newest first."""


class Calibration:
    """``windows``: how many the rolling figure is taken over."""

    def __init__(self, store: Found, judge: str, *, windows: int, drift_max: float) -> None:
        self.store = store
        self.judge = judge
        self.windows = windows
        DRIFT_MAX.set(drift_max)

    async def measure(self) -> None:
        """Tau of the newest window and of the rolling span, in both views, and how far the rolling one fell."""
        found = await self.store.newest(self.judge, 2 * self.windows)
        order = list(dict.fromkeys(row.window_id for row in found))
        recent, before = set(order[: self.windows]), set(order[self.windows :])
        for view in sorted({row.view for row in found}):
            of_view = [row for row in found if row.view == view]
            _show(view, "window", total(of_view, set(order[:1])))
            _show(view, "rolling", total(of_view, recent))
        blind = [row for row in found if row.view == BLIND]
        now, then = tau_b(total(blind, recent)), tau_b(total(blind, before))
        if now is not None and then is not None:
            DRIFT.set(then - now)


def total(found: Sequence[WindowPairs], windows: set[str]) -> Pairs:
    return sum((row.pairs for row in found if row.window_id in windows), Pairs())


def _show(view: str, span: str, pairs: Pairs) -> None:
    PAIRS.labels(view, span).set(pairs.pairs)
    if (tau := tau_b(pairs)) is not None:
        TAU.labels(view, span).set(tau)
