"""The confidence sequence: its formula, its validity at every look, its power. Seeds are fixed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.deployer.sequential import EFFECT_PRECISION, interval
from services.deployer.verdict_domain import Hold, Promote, RollBack, Verdict, decide
from shared.routing import Arm, Plan, RouteDocument, assigned

ROLLOUTS = 1000
LOOKS = 60
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)

numbers = st.floats(-1e6, 1e6)


def e_value(xs: list[float], mu0: float, g: float) -> float:
    """The mixture likelihood ratio by numerical integration over effect size and scale, straight from its definition.

    Numerator and denominator carry the right Haar prior d(sigma)/sigma; u = log sigma.
    """
    ys = [x - mu0 for x in xs]
    n, total, square = len(ys), sum(ys), sum(y * y for y in ys)

    def density(delta: float, u: float) -> float:
        sigma = math.exp(u)
        return math.exp(-n * u - square / (2 * sigma**2) + delta * total / sigma - n * delta**2 / 2)

    us = [-6 + 0.02 * i for i in range(600)]
    deltas = [-12 + 0.05 * i for i in range(481)]
    prior = [math.sqrt(g / (2 * math.pi)) * math.exp(-g * delta**2 / 2) for delta in deltas]
    top = sum(density(delta, u) * weight for u in us for delta, weight in zip(deltas, prior, strict=True)) * 0.05
    return top / sum(density(0.0, u) for u in us)


def test_the_interval_is_where_the_integrated_likelihood_ratio_stays_below_one_over_alpha() -> None:
    xs = [0.9, 1.4, 0.3, 1.1, 0.8, 1.3]
    for alpha in (0.05, 0.2):
        found = interval(xs, alpha)
        for bound in (found.lower, found.upper):
            assert e_value(xs, bound, EFFECT_PRECISION) == pytest.approx(1 / alpha, rel=1e-3)
        assert e_value(xs, found.mean, EFFECT_PRECISION) < 1 / alpha


@given(st.lists(numbers, min_size=2, max_size=30), st.floats(0.01, 100), st.floats(-100, 100))
def test_the_interval_moves_and_scales_with_its_data(xs: list[float], scale: float, shift: float) -> None:
    one, other = interval(xs, 0.05), interval([scale * x + shift for x in xs], 0.05)
    size = max(abs(x) for x in xs) * scale + abs(shift) + 1
    assert one.lower <= one.mean <= one.upper
    for a, b in ((one.lower, other.lower), (one.mean, other.mean), (one.upper, other.upper)):
        assert math.isinf(a) == math.isinf(b)
        if math.isfinite(a):
            assert abs(scale * a + shift - b) <= 1e-6 * size


@given(st.lists(numbers, max_size=3))
def test_few_windows_say_nothing(xs: list[float]) -> None:
    found = interval(xs, 0.05)
    assert (found.lower, found.upper) == (-math.inf, math.inf)


@given(st.lists(numbers, min_size=4, max_size=30))
def test_a_stricter_alpha_gives_a_wider_interval(xs: list[float]) -> None:
    wide, narrow = interval(xs, 0.01), interval(xs, 0.05)
    assert wide.lower <= narrow.lower
    assert narrow.upper <= wide.upper


def rollouts(difference: Callable[[random.Random, int], float], *, count: int = ROLLOUTS) -> list[tuple[Verdict, int]]:
    """The verdict of each rollout and its window, looking after every window up to ``LOOKS``."""
    results: list[tuple[Verdict, int]] = []
    for seed in range(count):
        rng, seen = random.Random(seed), list[float]()
        verdict: Verdict = decide(seen, alpha=0.05, min_windows=3, deadline_windows=LOOKS)
        while isinstance(verdict, Hold):
            seen.append(difference(rng, seed * LOOKS + len(seen)))
            verdict = decide(seen, alpha=0.05, min_windows=3, deadline_windows=LOOKS)
        results.append((verdict, len(seen)))
    return results


def shares(results: list[tuple[Verdict, int]]) -> tuple[float, float]:
    """Promoted, and rolled back as worse, as shares of all rollouts."""
    promoted = fmean(isinstance(verdict, Promote) for verdict, _ in results)
    worse = fmean(isinstance(verdict, RollBack) and verdict.reason == "worse" for verdict, _ in results)
    return promoted, worse


def test_equal_versions_are_promoted_in_at_most_5_percent_of_rollouts() -> None:
    promoted, worse = shares(rollouts(lambda rng, _: rng.gauss(0, 1)))
    assert promoted <= 0.05
    assert promoted + worse <= 0.05


def market(rng: random.Random, window: int, *, effect: float = 0.0) -> float:
    """One window's difference: 8 agents that differ by 0.3 of a run's standard deviation, drawn by ``assigned``, one
    scenario, so that the world's noise falls out. An empty arm is no evidence: drawn again."""
    agents = _agents(rng)
    for attempt in range(20):
        start = NOON + timedelta(hours=20 * window + attempt)
        arms: dict[str, list[float]] = {"v0": [], "v1": []}
        for name, skill in agents.items():
            arms[assigned(DOCUMENT, name, start)].append(skill + rng.gauss(0, 1))
        if arms["v0"] and arms["v1"]:
            return effect + fmean(arms["v1"]) - fmean(arms["v0"])
    raise AssertionError("twenty windows in a row with an empty arm")


def _agents(rng: random.Random) -> dict[str, float]:
    """The agents' own skill, the same in every window of a rollout."""
    if not hasattr(rng, "agents"):
        rng.agents = {f"agent-{n}": rng.gauss(0, 0.3) for n in range(8)}  # type: ignore[attr-defined]  # kept beside its rollout
    return rng.agents  # type: ignore[attr-defined,no-any-return]


DOCUMENT = RouteDocument(
    policy="default",
    revision=1,
    salt="salt",
    plans=[
        Plan(
            effective_from=NOON,
            arms=[Arm(version="v0", share=0.5, role="best"), Arm(version="v1", share=0.5, role="candidate")],
        )
    ],
    targets={},
)


@pytest.mark.timeout(300)
def test_agents_that_differ_promote_no_equal_version_because_they_are_drawn_afresh() -> None:
    promoted, worse = shares(rollouts(market))
    assert promoted <= 0.05
    assert promoted + worse <= 0.05


def test_yes_or_no_rewards_of_few_runs_promote_no_equal_version_either() -> None:
    """Far from Gaussian: one run in ten earns 1, four runs an arm and window."""

    def rare(rng: random.Random, _: int) -> float:
        return fmean(rng.random() < 0.1 for _ in range(4)) - fmean(rng.random() < 0.1 for _ in range(4))

    promoted, worse = shares(rollouts(rare))
    assert promoted <= 0.05
    assert promoted + worse <= 0.05


@pytest.mark.parametrize(("effect", "within"), [(1.0, 13), (1.5, 8), (2.0, 7), (3.0, 5)])
def test_a_real_effect_is_found_within_few_windows(effect: float, within: int) -> None:
    """Effects in standard deviations of a window's difference."""
    better = rollouts(lambda rng, _: rng.gauss(effect, 1), count=300)
    assert fmean(isinstance(verdict, Promote) for verdict, _ in better) >= 0.99
    assert median(windows for _, windows in better) <= within
    worse = rollouts(lambda rng, _: rng.gauss(-effect, 1), count=300)
    assert fmean(isinstance(v, RollBack) and v.reason == "worse" for v, _ in worse) >= 0.99
    assert median(windows for _, windows in worse) <= within


def test_a_better_version_is_found_among_agents_that_differ() -> None:
    results = rollouts(lambda rng, window: market(rng, window, effect=1.0), count=100)
    assert fmean(isinstance(verdict, Promote) for verdict, _ in results) >= 0.95
    assert median(windows for _, windows in results) <= 12
