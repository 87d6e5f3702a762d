"""What becomes a fact, and what is wrong with what does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ratchet_sdk.events import uuid7
from ratchet_sdk.outcomes import outcomes

from services.outcome_tracker.domain import FAULTS, fact_row, fault_of, source_of, storable
from shared.errors import GiveUpError
from shared.windows import EARLIEST

NOW = datetime(2026, 11, 20, 10, 30, tzinfo=UTC)


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


def test_what_the_contract_does_not_know_of_the_event_is_kept_beside_its_data() -> None:
    data = json.loads(event("metric", {"name": "m", "value": 1, "unit": "s"})) | {"from": "desk\0", "region": {"n": 1}}
    fact = fact_row(outcomes.validate_python(data), source="market", sequence=7, published_at=NOW)
    assert fact.data == {
        "name": "m",
        "value": 1.0,
        "unit": "s",
        "ratchet_note": "1 NUL characters were replaced",
    }
    assert fact.extra == {"from": "desk\N{REPLACEMENT CHARACTER}", "region": {"n": 1}}
    assert fact.key == ("market", fact.event_id)


@pytest.mark.parametrize(
    ("kind", "content", "fault"),
    [
        ("rumour", {}, "unknown kind"),
        ("price", {"symbol": "A", "price": float("nan")}, "not finite"),
        ("price", {"symbol": "A", "price": float("-inf")}, "not finite"),
        ("price", {"symbol": "A", "price": "NaN"}, "not finite"),
        ("knowledge", {"window_id": "w", "data": {"x": float("nan")}}, "not finite"),
        ("knowledge", {"window_id": "w", "data": {"x": float("inf")}}, "not finite"),
        ("price", {"symbol": "A", "price": 1, "volume": -1}, "negative volume"),
        ("resolution", {"market_id": "m", "question": "", "outcome": "", "volume": -1e-9}, "negative volume"),
        ("resolution", {"market_id": "m", "question": "", "outcome": "", "final_probability": -1}, "malformed"),
        ("price", {"symbol": "A"}, "malformed"),
        ("knowledge", {"data": {}}, "malformed"),
    ],
)
def test_a_metric_says_what_is_wrong(kind: str, content: dict[str, Any], fault: str) -> None:
    with pytest.raises((ValidationError, GiveUpError)) as refused:
        row(kind, content)
    assert fault_of(refused.value) == fault
    assert fault in FAULTS


@given(st.datetimes(timezones=st.just(UTC)) | st.sampled_from([datetime.min.replace(tzinfo=UTC)]))
def test_a_fact_has_a_time_that_a_window_can_have_or_is_refused(said: datetime) -> None:
    if EARLIEST <= said <= NOW + timedelta(seconds=300):
        assert row("metric", {"name": "m", "value": 1}, said).occurred_at == said
        return
    with pytest.raises(GiveUpError) as refused:
        row("metric", {"name": "m", "value": 1}, said)
    assert fault_of(refused.value) == ("too old" if said < EARLIEST else "from the future")


def test_a_fact_from_the_future_has_a_fault_of_its_own() -> None:
    with pytest.raises(GiveUpError) as refused:
        row("metric", {"name": "m", "value": 1}, NOW + timedelta(hours=1))
    assert fault_of(refused.value) == "from the future"
    with pytest.raises(ValidationError) as no_kind:
        outcomes.validate_json(b"{}")
    assert fault_of(no_kind.value) == "unknown kind"
