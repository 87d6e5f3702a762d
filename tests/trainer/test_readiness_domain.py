from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.domain import Empty, Entry, Ready, ScoredGroup, Wait
from services.trainer.readiness_domain import Conditions, cools_until, held_to, shared_out

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)


def entries(*agents: str) -> tuple[Entry, ...]:
    """One run of each agent named, each in a group of its own."""
    return tuple(Entry(agent, f"t{n}", f"g{n}", 1, "exact", 1.0, None) for n, agent in enumerate(agents))


def groups(*windows: str) -> list[ScoredGroup]:
    return [ScoredGroup(f"g{n}", 1, True, (), window) for n, window in enumerate(windows)]


def missing(agents: str, windows: str, conditions: Conditions) -> tuple[str, ...]:
    match held_to(Ready("grpo", entries(*agents)), groups(*windows), conditions, "seed"):
        case Wait(reasons):
            return reasons
    return ()


def test_a_batch_cools_down_after_the_last() -> None:
    assert cools_until(None, NOW, 60) is None
    assert cools_until(NOW - timedelta(seconds=59), NOW, 60) == NOW + timedelta(seconds=1)
    assert cools_until(NOW - timedelta(seconds=60), NOW, 60) is None
    assert cools_until(NOW, NOW, 0) is None


def test_what_is_missing_for_the_conditions_is_said() -> None:
    assert missing("ab", "uv", Conditions()) == ()
    assert missing("ab", "uv", Conditions(min_trajectories=3)) == ("grpo: 2 of 3 trajectories",)
    assert missing("ab", "uu", Conditions(min_windows=2)) == ("grpo: groups of 1 of 2 windows",)
    assert missing("ab", "uv", Conditions(min_windows=2, min_trajectories=2)) == ()
    assert missing("abb", "uvw", Conditions(agent_share=0.3)) == ("grpo: 2 of 4 agents, each with 30% of it at most",)
    assert missing("abbb", "uvvv", Conditions(min_trajectories=3, agent_share=0.5)) == ("grpo: 2 of 3 trajectories",)


def test_what_is_left_out_counts_for_no_window() -> None:
    first, second = entries("a", "b")
    found = held_to(
        Ready("grpo", (first, replace(second, left_out="no"))), groups("u", "v"), Conditions(min_windows=2), "seed"
    )
    assert found == Wait(("grpo: groups of 1 of 2 windows",))


@pytest.mark.parametrize("found", [Wait(("grpo: 1 of 8 groups",)), Empty(entries("a"))])
def test_a_plan_that_is_not_ready_stays_as_it_is(found: Wait | Empty) -> None:
    assert held_to(found, groups("u"), Conditions(min_windows=9), "seed") == found


def test_an_operators_wish_waits_for_nothing_but_hears_no_agent_louder() -> None:
    strict = Conditions(60.0, 100, 5, 0.5)
    assert strict.at_an_operators_wish() == Conditions(agent_share=0.5)


@given(
    st.lists(st.sampled_from("abcdef"), max_size=60),
    st.floats(0.05, 1),
    st.text(max_size=4),
    st.sets(st.integers(0, 59)),
)
def test_no_agent_has_more_than_its_share(agents: list[str], share: float, seed: str, out: set[int]) -> None:
    before = tuple(
        replace(entry, left_out="it has its reason") if n in out else entry for n, entry in enumerate(entries(*agents))
    )
    after = shared_out(before, share, seed)
    assert after == shared_out(before, share, seed), "the same lot again"
    had = Counter(entry.agent_id for entry in before if entry.left_out is None)
    kept = Counter(entry.agent_id for entry in after if entry.left_out is None)
    assert [replace(entry, left_out=None) for entry in after] == [replace(entry, left_out=None) for entry in before]
    assert all(was.left_out in (None, now.left_out) for was, now in zip(before, after, strict=True)), "only removes"
    if len(had) * share < 1:
        assert kept == had, "no cut would do: what is missing is said instead"
        return
    most, total = max(kept.values()), sum(kept.values())
    assert most <= share * total + 1e-6
    one_more = sum(min(count, most + 1) for count in had.values())
    assert kept == had or most + 1 > share * one_more, "as few as can be"
