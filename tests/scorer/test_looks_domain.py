"""Looks are averaged, their disagreement is measured, and tau-b is Kendall's."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scorer.looks_domain import (
    Pairs,
    averaged,
    disagreement,
    is_sampled,
    pairs_of,
    place_of,
    same_order,
    shown_order,
    tau_b,
)
from shared.trajectories import RunKey

A, B, C = ("a", "t"), ("b", "t"), ("c", "t")
keys = st.sets(st.tuples(st.text("abc", min_size=1, max_size=3), st.just("t")), min_size=2, max_size=8).map(sorted)


@given(keys, st.text(max_size=5), st.integers(0, 5))
def test_an_order_is_shuffled_repeatable_and_reversed_at_the_second_look(
    members: list[RunKey], group_id: str, look: int
) -> None:
    order = shown_order(group_id, "ratchet/1", members, look)
    assert sorted(order) == members
    assert shown_order(group_id, "ratchet/1", members[::-1], look) == order, "arrival plays no part"
    first = shown_order(group_id, "ratchet/1", members, look - look % 2)
    second = shown_order(group_id, "ratchet/1", members, look - look % 2 + 1)
    assert second == first[::-1]
    assert second != first


def test_orders_differ_by_group_and_by_pair_of_looks() -> None:
    members = [(agent, "t") for agent in "abcdefgh"]
    assert len({shown_order(f"g{n}", "r/1", members)[0] for n in range(40)}) > 5
    assert shown_order("g", "r/1", members, 0) != shown_order("g", "r/1", members, 2)


@given(st.lists(st.dictionaries(st.just(A) | st.just(B), st.floats(0, 1), min_size=2), min_size=1, max_size=4))
def test_a_mean_stays_in_bounds_and_equal_looks_do_not_disagree(looks: list[dict[RunKey, float]]) -> None:
    assert all(0 <= score <= 1 for score in averaged(looks).values())
    apart = disagreement(looks)
    assert (apart is None) == (len(looks) == 1)
    assert apart is None or 0 <= apart <= 1
    assert disagreement([looks[0], looks[0]]) == 0


def test_disagreement_is_the_mean_difference_of_a_members_scores() -> None:
    one, other = {A: 0.9, B: 0.1, C: 0.5}, {A: 0.7, B: 0.5, C: 0.5}
    assert averaged([one, other]) == pytest.approx({A: 0.8, B: 0.3, C: 0.5})
    assert disagreement([one, other]) == pytest.approx(0.2)
    assert disagreement([one, other, one]) == pytest.approx(0.4 / 3)
    assert same_order(one, other) == pytest.approx(2 / 3)
    assert same_order(one, one) == 1
    assert same_order({A: 0.5}, {A: 0.1}) is None


def test_places() -> None:
    assert [place_of(n, 4) for n in range(4)] == ["first", "middle", "middle", "last"]


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_a_sample_has_its_rate(rate: float) -> None:
    taken = sum(is_sampled(f"group-{n}", rate) for n in range(2000))
    assert taken / 2000 == pytest.approx(rate, abs=0.03)


# Kendall's tau-b ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [  # scipy.stats.kendalltau(a, b, variant="b").statistic, scipy 1.14
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1.0),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], -1.0),
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.4714045207910316),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9128709291752769),
        ([0.9, 0.5, 0.5, 0.1], [3.0, 2.0, 2.0, 1.0], 1.0),
        ([7, 1, 5], [0, 0, 1], 0.0),
    ],
)
def test_tau_b_is_scipys(a: list[float], b: list[float], tau: float) -> None:
    assert tau_b(pairs_of(a, b)) == pytest.approx(tau)


small = st.integers(0, 3).map(float)


@given(st.lists(st.tuples(small, small), max_size=8))
def test_tau_b_is_the_correlation_of_signs(members: list[tuple[float, float]]) -> None:
    """By another way: the correlation of the signs of differences over all ordered pairs."""
    signs = [
        (math.copysign(1, x - u) * (x != u), math.copysign(1, y - v) * (y != v))
        for (x, y), (u, v) in combinations(members, 2)
    ]
    root = math.sqrt(sum(p * p for p, _ in signs) * sum(q * q for _, q in signs))
    expected = sum(p * q for p, q in signs) / root if root else None
    found = tau_b(pairs_of([a for a, _ in members], [b for _, b in members]))
    assert found == (None if expected is None else pytest.approx(expected))
    assert found is None or -1 <= found <= 1 + 1e-12


def test_pairs_of_several_groups_add_up() -> None:
    one, other = pairs_of([1, 2], [1, 2]), pairs_of([1, 2, 2], [2, 1, 1])
    assert one + other == Pairs(4, 1, 2, 1, 1)
    assert tau_b(one + other) == pytest.approx(-1 / 3)
    assert tau_b(Pairs()) is None
