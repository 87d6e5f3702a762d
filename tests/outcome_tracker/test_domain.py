"""What becomes a fact, when a window is settled, and what its facts come to."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import outcomes, uuid7

from services.outcome_tracker.domain import (
    Mark,
    Position,
    Seen,
    Settle,
    TakeBarrier,
    Wait,
    change,
    fact_row,
    missing_rewards,
    next_move,
    source_of,
    storable,
    window_facts,
)
from shared.errors import GiveUpError

NOW = datetime(2026, 11, 20, 10, 30, tzinfo=UTC)
CREATED = datetime(2026, 11, 1, tzinfo=UTC)


def event(kind: str, content: dict[str, Any], occurred_at: datetime = NOW) -> bytes:
    head = {"schema": 1, "event_id": str(uuid7()), "occurred_at": occurred_at.isoformat()}
    return json.dumps({**head, "kind": kind, kind: content}).encode()


def row(kind: str, content: dict[str, Any], occurred_at: datetime = NOW) -> Any:
    parsed = outcomes.validate_json(event(kind, content, occurred_at))
    return fact_row(parsed, source="market", sequence=7, published_at=NOW)


@pytest.mark.parametrize(
    ("kind", "content", "columns"),
    [
        ("price", {"symbol": "ACME", "price": 3.5, "volume": 10, "mood": "odd"}, ("ACME", 3.5, None, None, None)),
        (
            "resolution",
            {"market_id": "m1", "question": "?", "outcome": "yes", "final_probability": 0.75},
            ("m1", 0.75, None, None, None),
        ),
        ("resolution", {"market_id": "m1", "question": "?", "outcome": "void"}, ("m1", None, None, None, None)),
        ("metric", {"name": "volatility", "value": 0.1}, ("volatility", 0.1, None, None, None)),
        (
            "trajectory",
            {"agent_id": "a", "trajectory_id": "t", "name": "reward", "value": -1},
            ("reward", -1.0, None, "a", "t"),
        ),
        ("knowledge", {"window_id": "w", "data": {"trend": "up"}}, (None, None, "w", None, None)),
        ("knowledge", {"agent_id": "a", "trajectory_id": "t", "data": {}}, (None, None, None, "a", "t")),
    ],
)
def test_each_kind_fills_its_columns(kind: str, content: dict[str, Any], columns: tuple[Any, ...]) -> None:
    fact = row(kind, content)
    assert (fact.name, fact.value, fact.window_id, fact.agent_id, fact.trajectory_id) == columns
    assert (fact.source, fact.sequence, fact.kind, fact.occurred_at) == ("market", 7, kind, NOW)
    assert content.items() <= fact.data.items()


@pytest.mark.parametrize("content", [{}, {"agent_id": "a"}, {"window_id": "w", "trajectory_id": "t"}])
def test_knowledge_about_nothing_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(GiveUpError, match="must name a window_id"):
        row("knowledge", {**content, "data": {}})


def test_five_minutes_of_a_wrong_clock_are_forgiven() -> None:
    assert row("metric", {"name": "m", "value": 1}, NOW + timedelta(minutes=5))
    with pytest.raises(GiveUpError, match="ahead of the broker"):
        row("metric", {"name": "m", "value": 1}, NOW + timedelta(minutes=5, seconds=1))


def test_nul_characters_are_replaced_with_a_note_and_numbers_must_be_finite() -> None:
    fact = row("price", {"symbol": "A", "price": 1, "news": "a\0b", "more": [{"k\0": "\0"}]})
    assert fact.data["news"] == "a\N{REPLACEMENT CHARACTER}b"
    assert fact.data["ratchet_note"] == "3 NUL characters were replaced"
    with pytest.raises(GiveUpError, match="not finite"):
        row("knowledge", {"window_id": "w", "data": {"deep": [1, {"x": float("nan")}]}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_what_is_storable_has_no_nul_and_is_otherwise_the_same(value: Any) -> None:
    clean, nuls = storable(value)
    text = json.dumps(clean, allow_nan=False)
    assert "\\u0000" not in json.dumps(json.loads(text))
    assert (clean == value) == (nuls == 0)


@pytest.mark.parametrize("subject", ["outcomes", "outcomes.", "outcomes.a.b", "outcomes.a b", "steps.a", "outcomes.é"])
def test_a_source_is_one_plain_token(subject: str) -> None:
    with pytest.raises(GiveUpError, match="one token"):
        source_of(subject)


def test_the_source_is_the_last_token() -> None:
    assert source_of("outcomes.market-1") == "market-1"


# settling ---------------------------------------------------------------------------------------
def at(end: int, floor: int, created: datetime = CREATED) -> Position:
    return Position(Mark(created, end), floor)


def test_a_window_is_settled_in_its_order() -> None:
    limits = {"min_s": 10.0, "max_s": 60.0}
    mark = Mark(CREATED, 5)
    assert next_move(9.9, None, at(5, 5), **limits) == Wait()
    assert next_move(9.9, mark, at(5, 5), **limits) == Wait()
    assert next_move(10, None, at(5, 5), **limits) == TakeBarrier(mark)
    assert next_move(10, mark, at(9, 4), **limits) == Wait()
    assert next_move(10, mark, at(9, 5), **limits) == Settle()
    assert next_move(60, mark, at(9, 5), **limits) == Settle()
    assert next_move(60, mark, at(9, 3), **limits) == Settle(("the barrier (2 outcomes are not read yet)",))
    anew = next_move(10, mark, at(9, 9, CREATED + timedelta(days=1)), **limits)
    assert anew == Settle(("the barrier (the stream of outcomes was made anew)",))


@given(st.floats(0, 100), st.integers(0, 20), st.integers(0, 20), st.booleans(), st.floats(0, 50), st.floats(0, 50))
def test_no_window_is_settled_early_nor_waits_for_ever(
    waited_s: float, end: int, floor: int, known: bool, min_s: float, more_s: float
) -> None:
    barrier = Mark(CREATED, end) if known else None
    move = next_move(waited_s, barrier, at(end, floor), min_s=min_s, max_s=min_s + more_s)
    if isinstance(move, Settle):
        assert waited_s >= min_s
        assert barrier is not None
        assert bool(move.missing) == (floor < end)
    if barrier is not None and waited_s >= min_s + more_s:
        assert isinstance(move, Settle)


def test_missing_rewards_are_counted() -> None:
    assert [missing_rewards(n) for n in (0, 1, 3)] == [(), ("reward of 1 run",), ("reward of 3 runs",)]


# a window's facts -------------------------------------------------------------------------------
def test_a_window_comes_to_its_first_and_last_and_what_was_said() -> None:
    seen = [
        Seen("price", "A", 2.0, {"volume": 5, "sentiment": 0.5, "news": "up"}),
        Seen("metric", "vix", 1.0, {}),
        Seen("price", "A", 9.0, {"volume": None, "sentiment": -1.0, "news": "up"}),
        Seen("price", "B", 0.0, {}),
        Seen("price", "A", 3.0, {"volume": 2, "news": "down"}),
        Seen("price", "B", 1.0, {}),
        Seen("resolution", "m", 0.4, {"question": "q", "outcome": "no", "final_probability": 0.4, "extra": 1}),
        Seen("resolution", "m", 1.0, {"question": "q", "outcome": "yes", "final_probability": 1.0, "volume": 7}),
        Seen("metric", "vix", 2.0, {}),
    ]
    assert window_facts(seen, knowledge=4) == {
        "prices": {
            "A": {"first": 2.0, "last": 3.0, "change": 0.5, "volume": 7, "sentiment": -0.25, "news": ["up", "down"]},
            "B": {"first": 0.0, "last": 1.0, "change": None, "volume": None, "sentiment": None, "news": []},
        },
        "resolutions": {"m": {"question": "q", "outcome": "yes", "final_probability": 1.0, "volume": 7}},
        "metrics": {"vix": {"value": 2.0, "count": 2}},
        "knowledge": 4,
    }
    assert window_facts([], knowledge=0) == {"prices": {}, "resolutions": {}, "metrics": {}, "knowledge": 0}


def test_a_flood_of_news_is_cut_and_says_so() -> None:
    facts = window_facts([Seen("price", "A", 1.0, {"news": f"news {n}"}) for n in range(23)], knowledge=0)
    assert len(facts["prices"]["A"]["news"]) == 20
    assert facts["prices"]["A"]["news_left_out"] == 3


finite_floats = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(finite_floats, finite_floats, finite_floats.map(abs)), min_size=1, max_size=6))
def test_no_price_however_odd_makes_a_fact_that_is_no_json(rows: list[tuple[float, float, float]]) -> None:
    seen = [Seen("price", "A", price, {"sentiment": mood, "volume": volume}) for price, mood, volume in rows]
    json.dumps(window_facts(seen, knowledge=0), allow_nan=False)


@given(finite_floats.filter(bool), st.floats(-1, 1))
def test_change_is_relative_to_the_first_price(first: float, relative: float) -> None:
    found = change(first, first * (1 + relative))
    assert found is None or found == pytest.approx(relative, rel=1e-6, abs=1e-6) or abs(first) < 1e-300
