"""The rollout's rules and the plans they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.deployer import domain
from services.deployer.domain import Assignment, Deployment, Line, RoutedRun, Tally, Version, assignment, compared
from services.deployer.planning import KEPT_PLANS, Shares, arms, coming_window, next_document
from services.deployer.sequential import Interval
from services.deployer.settings import DeployerSettings
from services.deployer.verdict_domain import Hold, Met, Promote, RollBack, Verdict, decide, lacking, summary
from shared.errors import ConfigurationError, GiveUpError
from shared.events import GatewayHealth, ModelDeployed, ModelRolledBack
from shared.routing import Arm, Plan, RouteDocument, Target, assigned
from shared.settings import load

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
SHARES = Shares(canary=0.5, base=0.1, anchor=0.05)


def run(scenario: str = "s", *, reward: float | None = 1.0, status: str = "completed", by: str = "v1") -> RoutedRun:
    return RoutedRun("a", "t", scenario, status, reward, frozenset([by]) if by else frozenset())


def deployment(version: str, state: Any, **more: Any) -> Deployment:
    number = int(version[1:])
    return Deployment(
        policy="default",
        version=version,
        number=number,
        method="base" if number == 0 else "grpo",
        artifact_sha256=version * 32,
        state=state,
        **{
            "parent": None,
            "control": None,
            "deadline_at": None,
            "reason": None,
            "evidence": {},
            "decision": 1,
            "created_at": NOON,
            "effective_from": None,
            "decided_at": NOON + timedelta(minutes=number),
            **more,
        },
    )


def line(**states: Any) -> Line:
    return Line(tuple(deployment(version, state) for version, state in states.items()))


@pytest.mark.parametrize(
    ("given", "counted", "penalty"),
    [
        (run(reward=2.0), 2.0, None),
        (run(reward=2.0, by=""), 2.0, None),
        (run(reward=2.0, status="failed"), 2.0, None),
        (run(reward=2.0, by="v0"), -3.0, "fallback"),
        (replace(run(reward=2.0), answered_by=frozenset(["v0", "v1"])), -3.0, "fallback"),
        (run(reward=None), -3.0, "no reward"),
        (run(reward=None, status="open"), -3.0, "no end"),
        (run(reward=None, status="truncated"), -3.0, "no end"),
        (run(reward=None, status="failed"), -3.0, "no end"),
    ],
)
def test_what_a_run_counts_for(given: RoutedRun, counted: float, penalty: str | None) -> None:
    assert assignment(given, "v1", -3.0) == Assignment(given, "v1", counted, penalty)
    assert assignment(given, "v1", None).penalty == penalty


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5)), max_size=9), st.floats(-5, -5))
def test_a_penalty_is_never_better_than_any_reward(rewards: list[float | None], worst: float) -> None:
    for reward in rewards:
        counted = assignment(run(reward=reward), "v1", worst).counted
        assert counted is not None
        assert assignment(run(reward=reward, by="v0"), "v1", worst).counted == worst <= counted


def test_runs_are_assigned_as_the_gateway_routes_them() -> None:
    document = next_document(None, line(v0="promoted", v1="canary"), **making())
    runs = [RoutedRun(f"a{n}", "t", "s", "completed", 1.0, frozenset()) for n in range(40)]
    for one in domain.assignments(runs, document, NOON, None):
        assert one.version == assigned(document, one.run.agent_id, NOON)


def counted(version: str, scenario: str, value: float | None) -> Assignment:
    return Assignment(run(scenario), version, value, None)


def test_versions_are_compared_scenario_by_scenario() -> None:
    """The lucky scenario s2 was met by the candidate alone, and s1 weighs as much with one run as s0 with three."""
    rows = [
        *(counted("v1", "s0", value) for value in (1.0, 2.0, 3.0)),
        counted("v0", "s0", 1.0),
        counted("v1", "s1", 10.0),
        *(counted("v0", "s1", value) for value in (9.0, 9.0)),
        counted("v1", "s2", 99.0),
        counted("v0", "s0", None),
        counted("v7", "s0", 99.0),
    ]
    found = compared(rows, "v1", "v0")
    assert found is not None
    assert (found.runs, found.control_runs) == (4, 3)
    assert (found.mean, found.control_mean, found.difference) == (6.0, 5.0, 1.0)
    assert compared(rows, "v1", "v2") is None
    assert compared([], "v1", "v0") is None


@given(
    st.lists(st.tuples(st.sampled_from(["v0", "v1"]), st.sampled_from("abc"), st.floats(-9, 9)), max_size=20),
    st.dictionaries(st.sampled_from("abc"), st.floats(-99, 99), min_size=3),
)
def test_the_world_s_noise_falls_out(rows: list[tuple[str, str, float]], noise: dict[str, float]) -> None:
    still = compared([counted(v, s, x) for v, s, x in rows], "v1", "v0")
    moved = compared([counted(v, s, x + noise[s]) for v, s, x in rows], "v1", "v0")
    assert (still is None) == (moved is None)
    if still and moved:
        assert still.difference == pytest.approx(moved.difference, abs=1e-9)


def test_what_a_plan_compares() -> None:
    plan = Plan(effective_from=NOON, arms=arms(SHARES, "v2", "v3", "v0", "v1"))
    assert domain.pairs(plan) == [("v3", "v2"), ("v2", "v0"), ("v2", "v1")]
    assert domain.pairs(Plan(effective_from=NOON, arms=arms(SHARES, "v0", None, "v0", None))) == []


def test_verdicts() -> None:
    def verdict(xs: list[float]) -> Verdict:
        return decide(xs, alpha=0.05, min_windows=5, deadline_windows=8)

    good = [1.0, 1.1, 0.9, 1.05]
    match verdict(good):
        case Hold(found):
            assert found.lower > 0
        case other:
            pytest.fail(f"{other}: four windows are fewer than five")
    assert isinstance(verdict([*good, 1.0]), Promote)
    bad = verdict([-x for x in good])
    assert isinstance(bad, RollBack)
    assert (bad.reason, bad.quarantines) == ("worse", True)
    late = verdict([1.0, -1.0] * 4)
    assert isinstance(late, RollBack)
    assert (late.reason, late.quarantines) == ("deadline", False)
    assert isinstance(verdict([]), Hold)
    assert isinstance(verdict([0.0] * 7), Hold)
    assert RollBack("broken endpoint").quarantines


@given(st.lists(st.floats(-9, 9), max_size=7))
def test_when_its_time_is_over_a_trial_ends_and_evidence_that_is_there_still_decides(xs: list[float]) -> None:
    terms = {"alpha": 0.05, "min_windows": 2, "deadline_windows": 99}
    before, after = decide(xs, **terms), decide(xs, **terms, over=True)
    if isinstance(before, Hold):
        assert after == RollBack("deadline", before.evidence)
    else:
        assert after == before


@pytest.mark.parametrize(
    ("met", "evidence", "words"),
    [
        (Met(9, 9, 9, 0, 9), 1, "no verdict from 1 window of evidence"),
        (Met(9, 9, 9, 0, 9), 3, "no verdict from 3 windows of evidence"),
        (Met(9, 9, 9, 0, 9), 0, "no reward"),
        (Met(9, 9, 9, 0, 0), 0, "no shared scenario"),
        (Met(9, 9, 0, 0, 0), 0, "no control"),
        (Met(9, 0, 9, 4, 0), 0, "no traffic: none of the runs was its own"),
        (Met(9, 0, 0, 4, 0), 0, "no traffic: 4 runs were answered by no version"),
        (Met(9, 0, 0, 0, 0), 0, "no traffic"),
        (Met(0, 0, 0, 0, 0), 0, "no window was settled"),
    ],
)
def test_what_a_trial_lacked(met: Met, evidence: int, words: str) -> None:
    assert lacking(met, evidence).startswith(words)


@given(st.lists(st.floats(-9, 9), max_size=7))
def test_a_verdict_mirrors(xs: list[float]) -> None:
    """What promotes a version would have rolled back its opposite."""
    one = decide(xs, alpha=0.05, min_windows=2, deadline_windows=99)
    other = decide([-x for x in xs], alpha=0.05, min_windows=2, deadline_windows=99)
    assert {Promote: RollBack, RollBack: Promote, Hold: Hold}[type(one)] is type(other)


def test_evidence_as_json() -> None:
    assert summary(None, 0.05) == {}
    assert summary(Interval(1, 2.0, -math.inf, math.inf), 0.05) == {
        "n": 1,
        "mean": 2.0,
        "lower": None,
        "upper": None,
        "alpha": 0.05,
    }


def report(requests: int, failures: int = 0, fallbacks: int = 0) -> GatewayHealth:
    return GatewayHealth(
        gateway="g",
        policy="default",
        version="v1",
        requests=requests,
        failures=failures,
        fallbacks=fallbacks,
        latency_ms_sum=0,
        at=NOON,
    )


def test_a_candidate_is_broken_when_it_fails_and_its_control_does_not() -> None:
    few = Tally().plus(report(19, fallbacks=19), control=False)
    assert not few.due
    assert not few.broken
    broken = few.plus(report(1), control=False)
    assert broken.broken
    assert broken.plus(report(40, failures=20), control=True).broken
    assert not broken.plus(report(40, failures=21), control=True).broken  # the endpoint is away for both
    assert not Tally().plus(report(20, failures=5, fallbacks=5), control=False).broken
    assert Tally().plus(report(20, failures=6, fallbacks=5), control=False).broken


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("promoted", ModelDeployed),
        ("superseded", ModelDeployed),
        ("rolled_back", ModelRolledBack),
        ("refused", ModelRolledBack),
        ("held", ModelRolledBack),
    ],
)
def test_announcements(state: str, kind: type) -> None:
    row = deployment("v2", state, control="v1", reason="r", evidence={"n": 3, "health": {}}, decision=4)
    event = domain.announcement(row)
    assert isinstance(event, kind)
    assert (event.evidence, event.reason, event.decision, event.key) == ({"n": 3}, "r", 4, "default:v2:4")
    assert (event.previous if isinstance(event, ModelDeployed) else event.back_to) == "v1"


def test_patience() -> None:
    row = deployment("v1", "verifying")
    assert not domain.patience_is_over(row, NOON + timedelta(seconds=10), 10)
    assert domain.patience_is_over(row, NOON + timedelta(seconds=11), 10)


def test_a_line_knows_its_versions() -> None:
    whole = line(v0="superseded", v1="superseded", v2="promoted", v3="rolled_back", v4="canary")
    names = [d.version for d in (whole.best, whole.candidate, whole.base, whole.previous) if d]
    assert names == ["v2", "v4", "v0", "v1"]
    none = Line(())
    assert none.best is none.candidate is none.base is none.previous is none.get("v0") is None
    assert line(v0="rolled_back", v1="promoted").base is None


def test_a_version_is_held_while_what_it_was_trained_from_has_fallen() -> None:
    child = deployment("v2", "verifying", parent="v1")
    for state, words in (("rolled_back", "rolled back (worse)"), ("refused", "refused"), ("held", "held")):
        fallen = deployment("v1", state, reason="worse" if state == "rolled_back" else None)
        assert Line((fallen, child)).why_held(child) == f"its parent v1 was {words}"
    for state in ("promoted", "superseded", "canary"):
        assert Line((deployment("v1", state), child)).why_held(child) is None
    assert Line((child,)).why_held(child) is None  # a parent that was never deployed: imported, or of another line
    assert Line((child,)).why_held(deployment("v0", "verifying")) is None


# plans -------------------------------------------------------------------------------------------


def at(base_url: str) -> Callable[[Version], Target]:
    return lambda version: Target(base_url=base_url, model=version.artifact_sha256 or "")


def making(**more: Any) -> dict[str, Any]:
    return {
        "shares": SHARES,
        "quarantined": [],
        "target_of": at("http://x/v1"),
        "now": NOON + timedelta(seconds=10),
        "window_s": 60,
        "salt": "salt",
        **more,
    }


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (("v0", None, "v0", None), {"v0": 1.0}),
        (("v0", "v1", "v0", None), {"v0": 0.5, "v1": 0.5}),
        (("v1", None, "v0", "v0"), {"v1": 0.9, "v0": 0.1}),
        (("v1", "v2", "v0", "v0"), {"v1": 0.4, "v2": 0.5, "v0": 0.1}),
        (("v2", "v3", "v0", "v1"), {"v2": 0.35, "v3": 0.5, "v0": 0.1, "v1": 0.05}),
        (("v2", None, None, "v1"), {"v2": 0.95, "v1": 0.05}),
    ],
)
def test_who_has_which_share(versions: Any, expected: dict[str, float]) -> None:
    made = {arm.version: arm.share for arm in arms(SHARES, *versions)}
    assert made == pytest.approx(expected)
    roles = [arm.role for arm in arms(SHARES, *versions)]
    assert roles.count("best") == 1
    assert roles.count("candidate") == (versions[1] is not None)


def test_without_a_base_share_the_previous_best_is_the_anchor() -> None:
    made = arms(Shares(0.1, 0.0, 0.05), "v1", None, "v0", "v0")
    assert [(arm.version, arm.role) for arm in made] == [("v1", "best"), ("v0", "anchor")]
    assert made[0].share == 0.95


@given(st.integers(0, 10**6), st.sampled_from([4, 5, 60, 3600]))
def test_a_plan_begins_with_a_window_that_gateways_can_have_heard_of(milliseconds: int, window_s: int) -> None:
    now = NOON + timedelta(milliseconds=milliseconds)
    start = coming_window(now, window_s)
    assert start.timestamp() % window_s == 0
    margin = min(5.0, window_s / 4)
    assert margin <= (start - now).total_seconds() <= margin + window_s


def test_documents_follow_each_other() -> None:
    first = next_document(None, line(v0="promoted"), **making())
    assert (first.revision, first.salt, first.plans[0].effective_from) == (1, "salt", NOON)
    assert next_document(first, line(v0="promoted"), **making()) is not None
    assert next_document(first, line(v0="promoted"), **making()) == first

    second = next_document(first, line(v0="promoted", v1="canary"), **making(salt="another"))
    assert (second.revision, second.salt, len(second.plans)) == (2, "salt", 2)
    assert second.plans[1].effective_from == NOON + timedelta(seconds=60)
    assert second.targets["v1"].model == "v1" * 32

    undone = next_document(second, line(v0="promoted", v1="rolled_back"), **making(quarantined=["v1", "v0"]))
    assert [plan.effective_from for plan in undone.plans] == [NOON, NOON + timedelta(seconds=60)]
    assert [arm.version for arm in undone.plans[1].arms] == ["v0"]
    assert undone.quarantined == []

    later = making(now=NOON + timedelta(seconds=70), quarantined=["v1", "v0"])
    rolled = next_document(second, line(v0="promoted", v1="rolled_back"), **later)
    assert (len(rolled.plans), rolled.quarantined, sorted(rolled.targets)) == (3, ["v1"], ["v0", "v1"])

    moved = next_document(rolled, line(v0="promoted", v1="rolled_back"), **{**later, "target_of": at("http://y/v1")})
    assert (moved.revision, moved.plans) == (rolled.revision + 1, rolled.plans)
    assert moved.targets["v0"].base_url == "http://y/v1"


def test_a_document_keeps_its_newest_plans() -> None:
    document: RouteDocument | None = None
    for n in range(KEPT_PLANS + 5):
        state = "canary" if n % 2 else "rolled_back"
        now = NOON + timedelta(minutes=2 * n)
        document = next_document(document, line(v0="promoted", v1=state), **making(now=now))
    assert document is not None
    assert len(document.plans) == KEPT_PLANS
    assert document.plans == sorted(document.plans, key=lambda plan: plan.effective_from)


def test_nothing_is_routed_without_a_promoted_version() -> None:
    with pytest.raises(GiveUpError, match="no version is promoted"):
        next_document(None, line(v0="verifying"), **making())


def test_shares_must_leave_the_best_one_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_CANARY_SHARE", "0.5")
    monkeypatch.setenv("RATCHET_BASE_SHARE", "0.45")
    with pytest.raises(ConfigurationError, match=r"RATCHET_ANCHOR_SHARE.*leave the best"):
        load(DeployerSettings)
    monkeypatch.setenv("RATCHET_BASE_SHARE", "0.1")
    assert load(DeployerSettings).anchor_share == 0.05


def test_an_arm_s_share_is_a_share() -> None:
    with pytest.raises(ValidationError):
        Arm(version="v0", share=-0.1, role="best")
