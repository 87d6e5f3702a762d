"""Windows: every instant lies in exactly one, and its id names it and no other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import GiveUpError
from shared.windows import EARLIEST, MAX_CLOCK_AHEAD_S, Window, placed_at, window_at, window_of_id

LENGTHS = st.integers(1, 7 * 86_400)
INSTANTS = st.integers(int(EARLIEST.timestamp()), 253_400_000_000).map(
    lambda second: datetime.fromtimestamp(second, UTC)
)
ANY = st.datetimes(
    timezones=st.timezones()
) | st.sampled_from(  # the contract bounds none, and UTC cannot hold them all
    [
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
    ]
)


@given(INSTANTS, LENGTHS)
def test_a_window_holds_its_instant_and_its_neighbours_do_not(instant: datetime, length_s: int) -> None:
    window = window_at(instant, length_s)
    assert window.starts_at <= instant < window.ends_at
    assert window.next().starts_at == window.ends_at
    assert window.previous().ends_at == window.starts_at
    assert window.next().previous() == window
    assert window_at(window.starts_at, length_s) == window


@given(INSTANTS, LENGTHS)
def test_an_id_names_its_window(instant: datetime, length_s: int) -> None:
    window = window_at(instant, length_s)
    assert window_of_id(window.window_id) == window


@given(INSTANTS, INSTANTS, LENGTHS, LENGTHS)
def test_two_windows_never_share_an_id(one: datetime, other: datetime, length_s: int, other_s: int) -> None:
    first, second = window_at(one, length_s), window_at(other, other_s)
    assert (first.window_id == second.window_id) == (first == second)


def test_ids_read_as_times() -> None:
    ten = datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert Window(ten, 3600).window_id == "2026-11-20T10:00"
    assert Window(ten, 900).window_id == "2026-11-20T10:00~900s"
    assert Window(ten, 5).window_id == "2026-11-20T10:00:00~5s"
    assert Window(ten + timedelta(seconds=30), 90).window_id == "2026-11-20T10:00:30~90s"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-20",
        "2026-11-20T10:07",  # on no hourly grid
        "2026-11-20T10:00:00",
        "2026-11-20T10:00~3600s",
        "2026-11-20T10:00~0s",
        "2026-11-20T10:00~-900s",
        "2026-11-20T10:00~900",
        "2026-11-20T10:00~xs",
        "2026-11-20T10:00+02:00",
        "9999-12-31T23:00",
        "0001-01-01T00:00",  # before any run can have started
        "1999-12-31T22:00",
    ],
)
def test_what_names_no_window_is_refused(text: str) -> None:
    with pytest.raises(GiveUpError, match="is no window id"):
        window_of_id(text)


@given(INSTANTS, st.floats(-1e6, 1e6))
def test_only_a_clock_far_ahead_is_corrected(received_at: datetime, ahead_s: float) -> None:
    started_at = received_at + timedelta(seconds=ahead_s)
    wrong = ahead_s > MAX_CLOCK_AHEAD_S or started_at < EARLIEST
    expected = (received_at, True) if wrong else (started_at, False)
    if abs(ahead_s - MAX_CLOCK_AHEAD_S) > 1e-5:
        assert placed_at(started_at, received_at) == expected


@given(ANY, INSTANTS, LENGTHS)
def test_no_instant_that_an_agent_may_say_breaks_a_window(said: datetime, received_at: datetime, length_s: int) -> None:
    """One that nobody can have started at is placed by the broker's time, and flagged."""
    placed, skewed = placed_at(said, received_at)
    window = window_at(placed, length_s)
    assert (window.next().starts_at, window.previous().ends_at) == (window.ends_at, window.starts_at)
    assert window_of_id(window.window_id) == window
    assert skewed == (placed != said)
    if said < EARLIEST:
        assert (placed, skewed) == (received_at, True)
    if skewed:
        assert window == window_at(received_at, length_s)


def test_the_limit_itself_is_not_ahead() -> None:
    now = datetime(2026, 11, 20, tzinfo=UTC)
    edge = now + timedelta(seconds=MAX_CLOCK_AHEAD_S)
    assert placed_at(edge, now) == (edge, False)
    assert placed_at(edge + timedelta(microseconds=1), now) == (now, True)
