"""Invariant 8: exactly the share it says, drawn afresh each window, the same in every replica."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.routing import Arm, Plan, RouteDocument, Target, assigned, draw, plan_at

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def plan(effective_from: datetime, shares: dict[str, float]) -> Plan:
    best = next(iter(shares))
    arms = [Arm(version=v, share=s, role="best" if v == best else "candidate") for v, s in shares.items()]
    return Plan(effective_from=effective_from, arms=arms)


def document(*plans: Plan, salt: str = "salt") -> RouteDocument:
    targets = {"v0": Target(base_url="http://x/v1", model="m", artifact_sha256="m")}
    return RouteDocument(policy="default", revision=1, salt=salt, plans=list(plans), targets=targets)


@pytest.mark.parametrize(
    "shares", [{"v0": 0.9, "v1": 0.1}, {"v0": 0.5, "v1": 0.5}, {"v0": 0.35, "v1": 0.5, "v2": 0.15}]
)
def test_shares_are_what_they_say(shares: dict[str, float]) -> None:
    """20,000 draws: each count within 4.5 standard deviations of a binomial, which chance exceeds once in 150,000."""
    made = document(plan(NOON, shares))
    counts = dict.fromkeys(shares, 0)
    for window in range(200):
        for agent in range(100):
            counts[assigned(made, f"agent-{agent}", NOON + window * HOUR)] += 1
    for version, share in shares.items():
        assert abs(counts[version] - 20_000 * share) < 4.5 * math.sqrt(20_000 * share * (1 - share))


def test_each_agent_meets_each_version_afresh() -> None:
    """No agent is bound to a version: over 400 windows every agent's own share is near the whole's, and draws of
    neighbouring windows agree no more often than chance lets them."""
    made = document(plan(NOON, {"v0": 0.5, "v1": 0.5}))
    bound = 4.5 * math.sqrt(400 * 0.25)
    for agent in range(8):
        drawn = [assigned(made, f"agent-{agent}", NOON + n * HOUR) == "v1" for n in range(400)]
        assert abs(sum(drawn) - 200) < bound
        assert abs(sum(a == b for a, b in pairwise(drawn)) - 199.5) < bound


@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.integers(0, 2**31))
def test_a_draw_is_a_number_in_the_unit_interval(salt: str, agent_id: str, at: int) -> None:
    assert 0 <= draw(salt, agent_id, datetime.fromtimestamp(at, UTC)) < 1


def test_another_process_draws_the_same() -> None:
    """Nothing of Python's seeded hashing is in it; the number itself is pinned, for gateways in other versions."""
    code = (
        "from datetime import datetime, UTC; from shared.routing import draw;"
        "print(repr(draw('salt', 'agent-1', datetime(2026, 11, 20, 12, tzinfo=UTC))))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(other.stdout) == draw("salt", "agent-1", NOON) == 0.7572296225570094


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.text(min_size=1, max_size=9), st.integers(0, 10**6))
def test_a_document_read_from_its_own_json_routes_alike(weights: list[float], agent_id: str, hours: int) -> None:
    shares = {f"v{n}": weight / sum(weights) for n, weight in enumerate(weights)}
    made = document(plan(NOON, shares))
    again = RouteDocument.model_validate_json(made.model_dump_json())
    version = assigned(made, agent_id, NOON + hours * HOUR)
    assert version in shares
    assert assigned(again, agent_id, NOON + hours * HOUR) == version


@given(st.integers(-50, 50), st.integers(1, 50))
def test_a_plan_rules_from_its_own_window_on(at: int, later: int) -> None:
    """A plan that was appended changes no window before it: runs that have started keep their version."""
    first, second = plan(NOON, {"v0": 1.0}), plan(NOON + later * HOUR, {"v1": 1.0})
    window = NOON + at * HOUR
    assert plan_at(document(first, second), window) is (second if at >= later else first)
    if at < later:
        agent = f"agent-{random.Random(at).randrange(99)}"
        assert assigned(document(first, second), agent, window) == assigned(document(first), agent, window)


def test_the_newest_plan_names_the_best() -> None:
    assert document(plan(NOON, {"v0": 1.0}), plan(NOON + HOUR, {"v1": 0.9, "v2": 0.1})).best() == "v1"
    anchors = Plan(effective_from=NOON, arms=[Arm(version="v7", share=1, role="anchor")])
    assert document(anchors).best() == "v7"


def test_an_arm_of_no_share_is_never_drawn_and_the_last_takes_what_rounding_leaves() -> None:
    made = document(plan(NOON, {"v0": 0.0, "v1": 1 - 1e-10}))
    assert {assigned(made, f"a{n}", NOON) for n in range(2000)} == {"v1"}


@pytest.mark.parametrize("shares", [{}, {"v0": 0.5}, {"v0": 0.7, "v1": 0.7}])
def test_shares_that_are_not_whole_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        Plan(effective_from=NOON, arms=[Arm(version=v, share=s, role="best") for v, s in shares.items()])
