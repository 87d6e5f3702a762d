"""What a window's facts come to, in whatever order they arrived."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.outcome_tracker.joined_domain import Joined, Seen, bounded, change

AT = datetime(2026, 11, 20, 10, tzinfo=UTC)


def test_a_flood_of_names_is_cut_and_says_so() -> None:
    assert bounded([str(n) for n in range(50)])[-1] == "49"
    assert bounded([str(n) for n in range(53)])[-2:] == ("49", "and 3 more")


def seen(kind: str, name: str, value: float | None, data: dict[str, Any], n: int = 0, **more: Any) -> Seen:
    return Seen(kind, name, value, data, AT + timedelta(seconds=n), UUID(int=n), **more)


def joined(found: Iterable[Seen]) -> Joined:
    """As the store reads them: in the order of their place."""
    made = Joined()
    for fact in sorted(found, key=lambda fact: fact.place):
        made.add(fact)
    return made


def window_facts(found: Iterable[Seen], *, knowledge: int) -> dict[str, Any]:
    return joined(found).facts(knowledge=knowledge)


def contradictions(found: Iterable[Seen], *, about_runs: int) -> tuple[str, ...]:
    return joined(found).contradictions(about_runs=about_runs)


MARKET = [
    seen("price", "A", 2.0, {"volume": 5, "sentiment": 0.5, "news": "up"}, 1),
    seen("metric", "vix", 1.0, {}, 2),
    seen("price", "A", 9.0, {"volume": None, "sentiment": -1.0, "news": "up"}, 3),
    seen("price", "B", 0.0, {}, 4),
    seen("price", "A", 3.0, {"volume": 2, "news": "down"}, 5),
    seen("price", "B", 1.0, {}, 6),
    seen("resolution", "m", 0.4, {"question": "q", "outcome": "yes", "final_probability": 0.4, "extra": 1}, 7),
    seen("resolution", "m", 1.0, {"question": "q", "outcome": "yes", "final_probability": 1.0, "volume": 7}, 8),
    seen("metric", "vix", 2.0, {}, 9),
]
CAME_TO = {
    "prices": {
        "A": {"first": 2.0, "last": 3.0, "change": 0.5, "volume": 7, "sentiment": -0.25, "news": ["up", "down"]},
        "B": {"first": 0.0, "last": 1.0, "change": None, "volume": None, "sentiment": None, "news": []},
    },
    "resolutions": {"m": {"question": "q", "outcome": "yes", "final_probability": 1.0, "volume": 7}},
    "metrics": {"vix": {"value": 2.0, "count": 2}},
    "knowledge": 4,
}


def test_a_window_comes_to_its_first_and_last_and_what_was_said() -> None:
    assert window_facts(MARKET, knowledge=4) == CAME_TO
    assert contradictions(MARKET, about_runs=0) == ()
    assert window_facts([], knowledge=0) == {"prices": {}, "resolutions": {}, "metrics": {}, "knowledge": 0}


@given(st.permutations(MARKET))
def test_the_order_of_arrival_changes_nothing(arrived: list[Seen]) -> None:
    assert json.dumps(window_facts(arrived, knowledge=4)) == json.dumps(window_facts(MARKET, knowledge=4))


finite_floats = st.floats(allow_nan=False, allow_infinity=False)
facts = st.builds(
    seen,
    st.sampled_from(["price", "metric"]),
    st.sampled_from(["A", "B"]),
    finite_floats,
    st.fixed_dictionaries({}, optional={"volume": st.floats(0, 1e300), "sentiment": finite_floats, "news": st.text()}),
)
resolutions = st.builds(
    lambda name, outcome, counts: seen("resolution", name, None, {"outcome": outcome}, counts=counts),
    st.sampled_from(["m", "n"]),
    st.sampled_from(["yes", "no", "void"]),
    st.booleans(),
)


@st.composite
def told(draw: st.DrawFn) -> list[Seen]:
    """Facts with times that often fall together; an id tells two facts apart, whatever their time."""
    found = draw(st.lists(facts | resolutions, max_size=12))
    return [
        replace(fact, occurred_at=AT + timedelta(seconds=draw(st.integers(0, 3))), event_id=UUID(int=n))
        for n, fact in enumerate(found)
    ]


@given(told(), st.randoms(use_true_random=False))
def test_facts_of_one_instant_too_mean_the_same_in_any_order(found: list[Seen], chance: Any) -> None:
    shuffled = list(found)
    chance.shuffle(shuffled)
    assert json.dumps(window_facts(found, knowledge=0)) == json.dumps(window_facts(shuffled, knowledge=0))
    assert contradictions(found, about_runs=0) == contradictions(shuffled, about_runs=0)


def test_a_flood_of_news_is_cut_and_says_so() -> None:
    found = window_facts([seen("price", "A", 1.0, {"news": f"news {n}"}, n) for n in range(23)], knowledge=0)
    assert len(found["prices"]["A"]["news"]) == 20
    assert found["prices"]["A"]["news_left_out"] == 3


@given(st.lists(st.tuples(finite_floats, finite_floats, finite_floats.map(abs)), min_size=1, max_size=6))
def test_no_price_however_odd_makes_a_fact_that_is_no_json(rows: list[tuple[float, float, float]]) -> None:
    found = [seen("price", "A", price, {"sentiment": mood, "volume": volume}) for price, mood, volume in rows]
    json.dumps(window_facts(found, knowledge=0), allow_nan=False)


@given(finite_floats.filter(bool), st.floats(-1, 1))
def test_change_is_relative_to_the_first_price(first: float, relative: float) -> None:
    assert change(None, first) is change(first, None) is change(0.0, first) is None
    found = change(first, first * (1 + relative))
    assert found is None or found == pytest.approx(relative, rel=1e-6, abs=1e-6) or abs(first) < 1e-300


def resolution(outcome: str, n: int, **more: Any) -> Seen:
    return seen("resolution", "m", 1.0, {"question": "q", "outcome": outcome}, n, **more)


def test_resolutions_that_disagree_are_flagged_and_the_last_one_counts() -> None:
    found = [resolution("yes", 1), resolution("no", 2)]
    assert window_facts(found, knowledge=0)["resolutions"]["m"] == {
        "question": "q",
        "outcome": "no",
        "final_probability": None,
        "volume": None,
        "contradicted_by": ["yes"],
    }
    assert contradictions(found, about_runs=0) == ("resolution:m: 2 outcomes were told; the last one counts",)


def test_what_another_window_heard_of_a_market_is_compared_and_does_not_count() -> None:
    found = [resolution("yes", 1), resolution("no", 5000, counts=False)]
    assert window_facts(found, knowledge=0)["resolutions"]["m"]["outcome"] == "yes"
    assert window_facts(found, knowledge=0)["resolutions"]["m"]["contradicted_by"] == ["no"]
    assert len(contradictions(found, about_runs=0)) == 1
    assert window_facts([resolution("no", 5000, counts=False)], knowledge=0)["resolutions"] == {}
    assert contradictions([resolution("no", 1, counts=False), resolution("x", 1, counts=False)], about_runs=0) == ()


def test_an_id_that_came_with_other_content_is_said_of_its_name() -> None:
    found = [seen("price", "A", 1.0, {}, 1, contradicted=True), seen("price", "A", 2.0, {}, 2)]
    assert contradictions(found, about_runs=2) == (
        "price:A: an event id came again with other content; the first one counts",
        "2 facts about runs: their event ids came again with other content; the first ones count",
    )
