"""When a window is settled, what its facts come to, and when a settlement is corrected."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.outcome_tracker.settling_domain import (
    Content,
    Correct,
    Mark,
    Position,
    Seen,
    Settle,
    TakeBarrier,
    TooLate,
    Wait,
    bounded,
    change,
    changed,
    contradictions,
    correction_move,
    correction_wait_s,
    missing_facts,
    next_move,
    not_pulled,
    window_facts,
)

CREATED = datetime(2026, 11, 1, tzinfo=UTC)
AT = datetime(2026, 11, 20, 10, tzinfo=UTC)


# when -------------------------------------------------------------------------------------------
def at(end: int, floor: int, created: datetime = CREATED) -> Position:
    return Position(Mark(created, end), floor)


def test_a_window_is_settled_in_its_order() -> None:
    limits: dict[str, Any] = {"lacking": False, "min_s": 10.0, "max_s": 60.0}
    lacking: dict[str, Any] = {**limits, "lacking": True}
    mark = Mark(CREATED, 5)
    assert next_move(9.9, None, at(5, 5), **limits) == Wait()
    assert next_move(9.9, mark, at(5, 5), **limits) == Wait()
    assert next_move(10, None, at(5, 5), **limits) == TakeBarrier(mark)
    assert next_move(10, mark, at(9, 4), **limits) == Wait()
    assert next_move(10, mark, at(9, 5), **limits) == Settle()
    assert next_move(59, mark, at(9, 5), **lacking) == Wait()
    assert next_move(60, mark, at(9, 5), **lacking) == Settle()
    assert next_move(60, mark, at(9, 5), **limits) == Settle()
    assert next_move(60, mark, at(9, 3), **limits) == Settle(("the barrier (2 outcomes are not read yet)",))
    anew = at(9, 9, CREATED + timedelta(days=1))
    assert next_move(10, mark, anew, **limits) == Settle(("the barrier (the stream of outcomes was made anew)",))
    assert next_move(10, mark, anew, **lacking) == Wait()


@given(
    st.floats(0, 100),
    st.integers(0, 20),
    st.integers(0, 20),
    st.booleans(),
    st.booleans(),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_no_window_is_settled_early_nor_waits_for_ever(
    waited_s: float, end: int, floor: int, known: bool, lacking: bool, min_s: float, more_s: float
) -> None:
    barrier = Mark(CREATED, end) if known else None
    move = next_move(waited_s, barrier, at(end, floor), lacking=lacking, min_s=min_s, max_s=min_s + more_s)
    if isinstance(move, Settle):
        assert waited_s >= min_s
        assert barrier is not None
        assert bool(move.missing) == (floor < end)
        assert not lacking or waited_s >= min_s + more_s
    if barrier is not None and waited_s >= min_s + more_s:
        assert isinstance(move, Settle)


# what is missing --------------------------------------------------------------------------------
def test_what_is_missing_is_named_and_rewards_are_counted() -> None:
    assert missing_facts({}, 0) == ()
    assert missing_facts({}, 1) == ("reward of 1 run",)
    unmet = {"reward": 3, "price:IRON": 4, "fact:reopened": 2, "resolution:m-1": 1, "knowledge": 1}
    assert missing_facts(unmet, 3) == (
        "fact:reopened of 2 runs",
        "knowledge",
        "price:IRON",
        "resolution:m-1",
        "reward of 3 runs",
    )


def test_a_flood_of_names_is_cut_and_says_so() -> None:
    assert bounded([str(n) for n in range(50)])[-1] == "49"
    assert bounded([str(n) for n in range(53)])[-2:] == ("49", "and 3 more")


def test_a_source_that_was_not_read_is_missing_with_its_reason() -> None:
    pulled = {"prices": None, "news": "it answered 503"}
    assert not_pulled(["prices", "news", "odds"], pulled) == (
        "source news (it answered 503)",
        "source odds (not asked yet)",
    )
    assert not_pulled([], pulled) == ()


# a window's facts -------------------------------------------------------------------------------
def seen(kind: str, name: str, value: float | None, data: dict[str, Any], n: int = 0, **more: Any) -> Seen:
    return Seen(kind, name, value, data, AT + timedelta(seconds=n), UUID(int=n), **more)


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


# corrections ------------------------------------------------------------------------------------
def test_a_correction_names_what_is_new_in_it() -> None:
    digests: dict[str, str | None] = {"reward": "r", "fact": None, "knowledge": "k"}
    before = Content(window_facts(MARKET, knowledge=1), 9, ("reward of 1 run",), (), digests)
    assert changed(before, before) == ()
    assert changed(before, replace(before, outcomes=99, missing=())) == ()
    later = [*MARKET, seen("price", "A", 4.0, {}, 10), resolution("no", 11), seen("metric", "new", 1.0, {}, 12)]
    after = Content(window_facts(later, knowledge=1), 12, (), contradictions(later, about_runs=0), digests)
    assert changed(before, after) == ("price:A", "resolution:m", "metric:new", "contradictions")
    about_runs = replace(before, digests={"reward": "other", "fact": "f", "knowledge": "k"})
    assert changed(before, about_runs) == ("fact", "reward")
    from_before_there_were_digests = replace(before, digests={})
    assert changed(from_before_there_were_digests, before) == ("knowledge", "reward")


def test_a_fact_that_moves_nothing_is_no_correction() -> None:
    before = Content(window_facts(MARKET, knowledge=0), 9)
    between = Content(window_facts([*MARKET, seen("price", "A", 100.0, {"sentiment": None}, 4)], knowledge=0), 10)
    assert changed(before, between) == ()


def test_corrections_wait_twice_as_long_each_time() -> None:
    assert [correction_wait_s(n, 60.0) for n in (1, 2, 3, 4)] == [60, 120, 240, 480]
    assert correction_wait_s(40, 60.0) == 86_400
    assert correction_wait_s(1, 100_000.0) == correction_wait_s(9, 100_000.0) == 100_000


def test_a_correction_has_its_time() -> None:
    limits: dict[str, Any] = {"after_s": 60.0, "within_s": 1000.0}
    assert correction_move(1, 59, 100, forced=False, **limits) == Wait()
    assert correction_move(1, 60, 1000, forced=False, **limits) == Correct()
    assert correction_move(2, 60, 100, forced=False, **limits) == Wait()
    assert correction_move(1, 60, 1001, forced=False, **limits) == TooLate()
    assert correction_move(9, 0, 1e9, forced=True, **limits) == Correct()


@given(st.floats(1, 86_400), st.floats(1, 30 * 86_400))
def test_a_window_is_corrected_a_bounded_number_of_times(after_s: float, within_s: float) -> None:
    """However many facts come: the waits of all corrections fit into the time for them."""
    spent, revision = 0.0, 1
    while correction_move(revision, correction_wait_s(revision, after_s), spent, forced=False, after_s=after_s,
                          within_s=within_s) == Correct():  # fmt: skip
        spent += correction_wait_s(revision, after_s)
        revision += 1
    assert revision <= 20 + within_s / max(after_s, 86_400)
