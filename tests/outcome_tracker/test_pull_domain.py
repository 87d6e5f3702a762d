"""From a row of a pull source to a fact, and what a configured place means."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import MAX_EVENT_BYTES, uuid7_time
from ratchet_sdk.outcomes import outcomes

from services.outcome_tracker.pull_domain import (
    Bad,
    Good,
    Place,
    checked_range,
    chunks,
    event_id,
    flat_event,
    places,
    pulled,
    retry_after_s,
    time_of,
)
from shared.errors import ConfigurationError, GiveUpError

FROM, TO = datetime(2026, 11, 20, 10, tzinfo=UTC), datetime(2026, 11, 20, 11, tzinfo=UTC)
PRICE = {"kind": "price", "occurred_at": "2026-11-20T10:30:00Z", "symbol": "ACME", "price": "3.5", "volume": ""}


def read(row: dict[str, Any], *, flat: bool = True, now: datetime = TO) -> Any:
    return pulled("prices", "line 2", row, FROM, TO, now=now, flat=flat)


def test_places_are_read_from_the_setting() -> None:
    assert places("") == ()
    assert places("a=/x/p.csv  b=q.csv.gz\nc=z.parquet d=https://host/facts?market=1 e=http://h") == (
        Place("a", "csv", "/x/p.csv"),
        Place("b", "csv", "q.csv.gz"),
        Place("c", "parquet", "z.parquet"),
        Place("d", "http", "https://host/facts?market=1"),
        Place("e", "http", "http://h"),
    )


@pytest.mark.parametrize(
    "text", ["p.csv", "=p.csv", "a b=p.csv", "two.tokens=p.csv", "a=x.csv a=y.csv", "a=p.xls", "a="]
)
def test_what_is_no_place_is_a_wrong_setting(text: str) -> None:
    with pytest.raises(ConfigurationError, match="RATCHET_OUTCOME_SOURCES"):
        places(text)


def test_a_row_becomes_the_fact_that_the_world_would_publish() -> None:
    fact = read({**PRICE, "news": "up", "desk": "7"})
    assert isinstance(fact, Good)
    event = outcomes.validate_json(fact.data)
    assert json.loads(fact.data)["price"] == {"symbol": "ACME", "price": 3.5, "news": "up", "desk": "7"}
    assert (event.event_id, event.occurred_at) == (fact.row.event_id, FROM + timedelta(minutes=30))
    assert (fact.row.source, fact.row.name, fact.row.value) == ("prices", "ACME", 3.5)
    assert uuid7_time(fact.row.event_id) == FROM + timedelta(minutes=30)
    assert read(PRICE).row.data["volume"] is None
    assert read(PRICE).sha256 == read(dict(reversed(PRICE.items()))).sha256 != fact.sha256


def test_knowledge_carries_json_in_its_cell() -> None:
    row = {"kind": "knowledge", "occurred_at": "2026-11-20T10:30:00Z", "window_id": "w", "data": '{"drift": 1}'}
    assert read(row).row.data["data"] == {"drift": 1}
    assert read({**row, "data": "{"}).reason.startswith("data is no JSON")


def test_a_fact_of_an_endpoint_may_bring_its_own_id() -> None:
    own = "019aa0c4-1f00-7000-8000-0123456789ab"
    fact = {
        "schema": 1,
        "kind": "metric",
        "occurred_at": "2026-11-20T12:30:00+02:00",
        "metric": {"name": "m", "value": 1},
    }
    assert str(read({**fact, "event_id": own}, flat=False).row.event_id) == own
    assert str(read(fact, flat=False).row.event_id) != own
    assert read({**fact, "event_id": "7"}, flat=False).reason.startswith("not an outcome: metric.event_id")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"kind": "rumour"}, "not an outcome: the object: Input tag 'rumour'"),
        ({"kind": ""}, "not an outcome: the object: Unable to extract tag"),
        ({"price": "NaN"}, "finite number"),
        ({"price": "dear"}, "valid number"),
        ({"price": None}, "price.price.price: Field required"),
        ({"volume": "-1"}, "price.price.volume"),
        ({"occurred_at": "2026-11-20T10:30:00"}, "a time with its zone"),
        ({"occurred_at": "0001-01-01T00:00:00+14:00"}, "a time with its zone"),
        ({"occurred_at": None}, "a time with its zone"),
        ({"news": "x" * MAX_EVENT_BYTES}, "over the limit"),
        ({"symbol": "a\0b"}, "price.price.symbol"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(wrong: dict[str, Any], reason: str) -> None:
    bad = read({**PRICE, **wrong})
    assert isinstance(bad, Bad)
    assert reason in bad.reason
    assert bad.where == "line 2"
    assert len(bad.data) <= 65_536
    assert bad.key == read({**PRICE, **wrong}).key


def test_a_row_from_the_future_is_bad_and_one_of_another_time_is_not_asked_for() -> None:
    ahead = read(PRICE, now=FROM)
    assert ("ahead of the broker" in ahead.reason, ahead.fault) == (True, "from the future")
    assert [read({**PRICE, "kind": "x"}).fault, read({**PRICE, "price": "inf"}).fault] == ["unknown kind", "not finite"]
    assert read({**PRICE, "occurred_at": "2026-11-20T11:00:00Z"}) is None
    assert read({**PRICE, "occurred_at": "2026-11-20T09:59:59.999999Z"}) is None
    assert isinstance(read({**PRICE, "occurred_at": "2026-11-20T10:00:00Z"}), Good)


cells = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8) | st.none() | st.floats(), max_size=6)


@given(cells, cells, st.integers(0, 2**40))
def test_the_same_row_has_the_same_id_and_another_one_another(
    row: dict[str, Any], other: dict[str, Any], ms: int
) -> None:
    at = datetime.fromtimestamp(ms / 1000, UTC)
    row, other = ({k: v for k, v in one.items() if k != "id"} for one in (row, other))
    own = event_id("s", row, at)
    assert own == event_id("s", dict(reversed(row.items())), at)
    assert own != event_id("another", row, at)
    assert abs(uuid7_time(own) - at) <= timedelta(milliseconds=1)
    if repr(sorted(row.items(), key=str)) != repr(sorted(other.items(), key=str)):
        assert own != event_id("s", other, at)


def test_an_id_column_names_the_row_whatever_else_it_says() -> None:
    assert event_id("s", {"id": 1, "price": 2}, FROM) == event_id("s", {"id": 1, "price": 3}, FROM)
    assert event_id("s", {"id": "", "price": 2}, FROM) != event_id("s", {"id": "", "price": 3}, FROM)
    assert event_id("s", {"id": 1}, datetime(1960, 1, 1, tzinfo=UTC)).version == 7


def test_a_flat_row_without_a_kind_is_left_to_the_contract() -> None:
    assert flat_event({"kind": "", "a": 1, "occurred_at": "x"}) == {"occurred_at": "x"}
    assert time_of({"occurred_at": FROM}) == FROM


# how often --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("header", "attempt", "expected"),
    [
        (None, 0, 1),
        (None, 3, 8),
        (None, 30, 30),
        ("2", 0, 2),
        ("2.5", 0, 2.5),
        ("1e999", 0, 30),
        ("nan", 0, 30),
        ("-5", 0, 0),
        ("900", 0, 30),
        ("Fri, 20 Nov 2026 10:00:07 GMT", 0, 7),
        ("Fri, 20 Nov 2026 09:00:00 GMT", 0, 0),
        ("Fri, 20 Nov 2026 09:00:00", 1, 2),
        ("soon", 2, 4),
    ],
)
def test_retry_after_is_honoured_within_bounds(header: str | None, attempt: int, expected: float) -> None:
    assert retry_after_s(header, attempt, FROM, most_s=30.0) == expected


@given(st.sets(st.integers(0, 400)), st.integers(1, 50))
def test_parts_of_a_range_hold_each_window_once_and_leave_no_gap(minutes: set[int], length: int) -> None:
    starts = [FROM + timedelta(minutes=n) for n in sorted(minutes)]
    end = FROM + timedelta(minutes=401)
    parts = list(chunks(starts, FROM, end, length_s=length * 60))
    assert sum(number for _, _, number in parts) == len(starts)
    if starts:
        assert (parts[0][0], parts[-1][1]) == (FROM, end)
    assert [end for _, end, _ in parts[:-1]] == [start for start, _, _ in parts[1:]]
    for begin, end, number in parts:
        inside = [at for at in starts if begin <= at < end]
        assert len(inside) == number
        assert inside[-1] - inside[0] < timedelta(minutes=length)


def test_a_range_is_checked() -> None:
    checked_range(FROM, TO)
    for wrong in ((TO, FROM), (FROM, FROM), (FROM, FROM + timedelta(days=401))):
        with pytest.raises(GiveUpError, match="range"):
            checked_range(*wrong)
