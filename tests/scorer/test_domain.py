"""Grouping is a partition that arrival cannot move; scores follow ranks and nothing else."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scorer.domain import (
    Member,
    Sampling,
    drop_rate,
    dropped,
    form_groups,
    group_id,
    partition,
    pause_s,
    scores_of_rewards,
    situation,
    start_signature,
    verdict,
)
from services.scorer.standing_domain import Run, standing
from shared.trajectories import RunKey, assemble
from tests.scorer.runs import WINDOW, events

GOOD = Run("a", "t", "default", "ACME", "completed", late=False, called=True, rewarded=True, signature="s")

names = st.text("abc123", min_size=1, max_size=4)
keys = st.tuples(names, names)
key_sets = st.sets(keys, max_size=40).map(sorted)
runs = st.builds(
    Run,
    agent_id=names,
    trajectory_id=names,
    policy=st.sampled_from(["default", "posters"]),
    scenario_id=st.sampled_from(["x", "y"]),
    status=st.sampled_from(["completed", "failed", "truncated", "open"]),
    late=st.booleans(),
    called=st.booleans(),
    rewarded=st.booleans(),
    signature=st.sampled_from(["s", "s", "other", None]),
)
run_sets = st.lists(runs, max_size=40, unique_by=lambda run: run.key)


@given(key_sets, st.integers(2, 9))
def test_a_split_is_a_partition_in_even_parts(members: list[RunKey], group_max: int) -> None:
    parts = partition(members, group_max)
    sizes = [len(part) for part in parts]
    assert sorted(key for part in parts for key in part) == members
    assert len(parts) == math.ceil(len(members) / group_max)
    assert not sizes or (max(sizes) - min(sizes) <= 1 and max(sizes) <= group_max)
    if group_max > 2 and len(members) > 1:
        assert min(sizes) >= 2, "nobody is left alone by a split"


@given(run_sets, st.integers(2, 5), st.booleans(), st.randoms(use_true_random=False))
def test_groups_hold_every_run_once_whatever_the_order(
    window: list[Run], group_max: int, by_outcome: bool, chance: random.Random
) -> None:
    groups = form_groups(WINDOW, window, group_max=group_max, by_outcome=by_outcome)
    placed = [member.key for group in groups for member in group.members]
    assert sorted(placed) == sorted(run.key for run in window)
    by_key = {run.key: run for run in window}
    for group in groups:
        assert group.counting <= group_max
        for member in group.members:
            run = by_key[member.key]
            assert (run.policy, run.scenario_id) == (group.policy, group.scenario_id)
            assert member == Member.of(run.key, standing(run, by_outcome=by_outcome))
        counting = [member for member in group.members if member.left_out is None]
        judged = [member for member in counting if member.ranks_last is None]
        assert group.homogeneous == (len({by_key[member.key].signature for member in judged or counting}) == 1)
    arrived = list(window)
    chance.shuffle(arrived)
    assert form_groups(WINDOW, arrived, group_max=group_max, by_outcome=by_outcome) == groups
    assert len({group.group_id for group in groups}) == len(groups)


def test_those_left_out_are_spread_over_the_parts() -> None:
    window = [replace(GOOD, trajectory_id=f"t{n}", late=n >= 6) for n in range(60)]
    groups = form_groups(WINDOW, window, group_max=2, by_outcome=False)
    assert [group.counting for group in groups] == [2, 2, 2]
    assert all(len(group.members) > group.counting for group in groups)


@given(run_sets, run_sets)
def test_late_runs_change_no_group(window: list[Run], late: list[Run]) -> None:
    known = {run.key for run in window}
    more = [replace(run, late=True) for run in late if run.key not in known]

    def judged(runs: list[Run]) -> list[Any]:
        groups = form_groups(WINDOW, runs, group_max=3, by_outcome=True)
        return [[m.key for m in group.members if m.left_out is None] for group in groups if group.counting]

    assert judged(window) == judged(window + more)


def test_a_group_has_a_name_that_says_where_it_lies_and_fits_a_url() -> None:
    name = group_id("default", "2026-11-20T10:00~900s", "wild / scenario?", 0)
    assert re.fullmatch(r"default-20261120T1000900s-[0-9a-f]{16}", name)
    others = [("posters", WINDOW, "s", 0), ("default", WINDOW, "s", 1), ("default", WINDOW, "s0", 0)]
    assert len({group_id(*other) for other in others}) == 3


def run_of(changed: Any = None, **said: Any) -> Any:
    sent = events("t", **said)
    if changed:
        changed(sent)
    return assemble("a", "t", [event.model_dump_json(by_alias=True).encode() for event in sent])


def other_tools(sent: list[Any]) -> None:
    sent[1].llm_calls[0].tools = [{"type": "function"}]


def other_world(sent: list[Any]) -> None:
    sent[1].environment = {"prices": {"ACME": 11}}


def other_task(sent: list[Any]) -> None:
    sent[1].llm_calls[0].messages[1]["content"] = "IRON fell."


def other_goal(sent: list[Any]) -> None:
    sent[0].goal = "lose money"


def test_a_start_is_what_the_agent_could_not_choose() -> None:
    """All that its model was first asked, the user's words among it, its tools, and what it saw."""
    same = start_signature(run_of())
    assert start_signature(run_of(said="sell", own_reward=3.0)) == same
    changed = [start_signature(run_of(change)) for change in (other_tools, other_world, other_task)]
    assert len({same, start_signature(run_of(system="You gamble.")), *changed}) == 5
    assert start_signature(assemble("a", "t", [])) == start_signature(assemble("b", "t", []))


def test_runs_without_a_scenario_are_alike_where_they_were_set_to_do_the_same() -> None:
    same = situation(run_of())
    assert same is not None
    assert re.fullmatch(r"unnamed-[0-9a-f]{16}", same)
    assert (
        situation(run_of(said="sell", system="You gamble.", own_reward=3.0)) == situation(run_of(other_tools)) == same
    )
    assert len({same, *(situation(run_of(change)) for change in (other_world, other_task, other_goal))}) == 4
    assert situation(assemble("a", "t", [])) is None


# scores -----------------------------------------------------------------------------------------
def named(*rewards: float | None) -> dict[RunKey, float | None]:
    return {("a", str(n)): reward for n, reward in enumerate(rewards)}


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [
        ((1.0, 3.0, 2.0), (0.0, 1.0, 0.5)),
        ((5.0, 5.0, 1.0), (0.75, 0.75, 0.0)),
        ((5.0, 1.0, 1.0, 1.0), (1.0, 1 / 3, 1 / 3, 1 / 3)),
        ((2.0, 2.0), (0.5, 0.5)),
        ((0.1 + 0.2, 0.3), (0.5, 0.5)),
        ((-7.0, None, None), (1.0, 0.25, 0.25)),
        ((None, None), (0.5, 0.5)),
        ((4.0,), (0.5,)),
    ],
)
def test_scores_are_mean_ranks(rewards: tuple[float | None, ...], scores: tuple[float, ...]) -> None:
    found = scores_of_rewards(named(*rewards))
    assert [found[key] for key in named(*rewards)] == pytest.approx(list(scores))


@given(st.dictionaries(keys, st.none() | st.integers(-5, 5).map(float), min_size=2, max_size=9))
def test_scores_keep_the_order_and_depend_on_nothing_else(rewards: dict[RunKey, float | None]) -> None:
    scores = scores_of_rewards(rewards)
    assert scores_of_rewards(dict(reversed(rewards.items()))) == scores
    assert sum(scores.values()) == pytest.approx(len(scores) / 2)
    worth = {key: -math.inf if reward is None else reward for key, reward in rewards.items()}
    for one in rewards:
        assert 0 <= scores[one] <= 1
        for other in rewards:
            assert (worth[one] > worth[other]) == (scores[one] > scores[other])
    assert (verdict(scores).state == "tie") == (len(set(worth.values())) == 1)


def test_a_verdict_ranks_from_one_and_knows_a_tie() -> None:
    found = verdict({("a", "1"): 0.2, ("b", "1"): 0.9, ("c", "1"): 0.9})
    assert (found.state, found.spread) == ("scored", pytest.approx(0.7))
    assert found.ranks == {("a", "1"): 3, ("b", "1"): 1, ("c", "1"): 1}
    assert verdict({("a", "1"): 0.5, ("b", "1"): 0.5 + 1e-12}).state == "tie"


def test_a_failing_judge_is_asked_ever_more_rarely() -> None:
    assert [pause_s(n) for n in (1, 2, 3, 99)] == [30, 60, 120, 3600]


def test_a_run_that_timed_out_ranks_last_whatever_was_said_for_it() -> None:
    a, b, c = (("a", "1"), ("b", "1"), ("c", "1"))
    found = verdict({a: 0.4, b: 0.9, c: 0.0}, {a: "completed", b: "truncated", c: "failed"})
    assert (found.scores, found.ranks) == ({a: 0.7, b: 0.0, c: 0.5}, {a: 1, c: 2, b: 3})
    assert verdict({a: 0.9, b: 0.3}, {a: "truncated", b: "completed"}).state == "scored"
    both = verdict({a: 0.9, b: 0.3}, {a: "truncated", b: "truncated"})
    assert (both.scores, both.ranks) == ({a: 0.9, b: 0.3}, {a: 1, b: 2}), "among themselves they are judged"


@given(
    st.dictionaries(keys, st.floats(0, 1), max_size=6),
    st.dictionaries(keys, st.just("it never ended"), min_size=1, max_size=4),
    st.sampled_from(["completed", "truncated"]),
)
def test_who_ranks_last_is_below_all_that_were_judged(
    judged: dict[RunKey, float], last: dict[RunKey, str], status: str
) -> None:
    judged = {key: score for key, score in judged.items() if key not in last}
    statuses = {key: status if n else "completed" for n, key in enumerate(judged)}
    found, alone = verdict(judged, statuses, last), verdict(judged, statuses) if judged else None
    for key in last:
        assert (found.scores[key], found.ranks[key]) == (0, len(judged) + 1)
    for key in judged:
        assert found.ranks[key] == (alone.ranks[key] if alone else 0)
        assert (found.scores[key] > 0) == (statuses[key] == "completed")
    assert (found.state == "tie") == (not judged)


def test_the_places_of_those_that_were_judged_are_their_mean_ranks_among_all() -> None:
    rewards = named(1.0, 3.0, 2.0)
    last = {("b", "1"): "it never ended", ("c", "1"): "it never ended"}
    found = verdict(scores_of_rewards(rewards), None, last)
    among_all = scores_of_rewards({**rewards, **dict.fromkeys(last)})
    assert [found.scores[key] for key in rewards] == pytest.approx([among_all[key] for key in rewards])


# dropping ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("total", "target", "max_rate", "rate"),
    [(100, 0, 0.5, 0), (100, 100, 0.5, 0), (99, 100, 0.5, 0), (120, 100, 0.5, 1 / 6), (1000, 100, 0.3, 0.3)],
)
def test_the_rate_is_of_real_counts(total: int, target: int, max_rate: float, rate: float) -> None:
    sampling = Sampling(target, max_rate)
    assert drop_rate(total, sampling) == pytest.approx(rate)
    members = [(f"a{n}", "t") for n in range(total)]
    gone = dropped(members, sampling, "w")
    assert len(gone) == int(rate * total + 1e-6)
    assert gone <= set(members)
    assert dropped(members[::-1], sampling, "w") == gone
    if rate > 0:
        assert dropped(members, replace(sampling, seed=1), "w") != gone
        assert dropped(members, sampling, "other window") != gone


@given(run_sets, st.integers(1, 10), st.floats(0, 0.9), st.randoms(use_true_random=False))
def test_what_is_dropped_is_whole_runs_with_their_reason(
    window: list[Run], target: int, max_rate: float, chance: random.Random
) -> None:
    sampling = Sampling(target, max_rate, seed=3)
    groups = form_groups(WINDOW, window, group_max=4, by_outcome=False, sampling=sampling)
    plain = form_groups(WINDOW, window, group_max=4, by_outcome=False)

    def told(groups: list[Any]) -> dict[RunKey, str | None]:
        return {member.key: member.left_out for group in groups for member in group.members}

    assert sorted(told(groups)) == sorted(run.key for run in window)
    policies = {run.key: run.policy for run in window}
    for policy in set(policies.values()):
        before = [key for key, reason in told(plain).items() if reason is None and policies[key] == policy]
        after = [key for key in before if told(groups)[key] is None]
        assert len(after) >= min(target, len(before))
        assert all("dropped at random" in (told(groups)[key] or "") for key in set(before) - set(after))
    arrived = list(window)
    chance.shuffle(arrived)
    assert form_groups(WINDOW, arrived, group_max=4, by_outcome=False, sampling=sampling) == groups
