"""When a window may close, and which quiet windows get their rows."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.recorder import window_domain as domain
from services.recorder.window_domain import (
    Close,
    OpenWindow,
    ReadBarrier,
    Wait,
    missing_windows,
    next_move,
)
from shared.windows import window_at

CREATED = datetime(2026, 11, 1, tzinfo=UTC)
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


WINDOWS = st.builds(
    OpenWindow,
    window_id=st.just("w"),
    ends_at=st.integers(-400, 400).map(at),
    close_requested=st.booleans(),
    barrier_created=st.sampled_from([None, CREATED, CREATED + timedelta(days=1)]),
    barrier_sequence=st.integers(0, 20),
    newest_open_start=st.none() | st.integers(-1000, 400).map(at),
    last_end_sequence=st.integers(0, 20),
).map(lambda w: w if w.barrier_created else replace(w, barrier_sequence=None))
FLOORS = st.integers(0, 25)


def move(window: OpenWindow, floor: int, now: datetime = NOW) -> domain.Move:
    return next_move(window, now, grace_s=60, limit_s=300, stream_created=CREATED, floor=floor)


@given(WINDOWS, FLOORS)
def test_a_window_closes_only_when_all_of_it_is_known(window: OpenWindow, floor: int) -> None:
    """Invariant 4, each condition on its own."""
    if move(window, floor) != Close():
        return
    assert window.close_requested or window.ends_at + timedelta(seconds=60) <= NOW
    assert window.newest_open_start is None or window.newest_open_start + timedelta(seconds=300) <= NOW
    assert window.barrier_created == CREATED
    assert window.barrier_sequence is not None
    assert floor >= window.barrier_sequence
    assert floor >= window.last_end_sequence


@given(WINDOWS, FLOORS)
def test_a_window_whose_conditions_hold_does_close(window: OpenWindow, floor: int) -> None:
    ready = replace(
        window, ends_at=at(-60), newest_open_start=at(-300), barrier_created=CREATED, last_end_sequence=floor
    )
    assert move(replace(ready, barrier_sequence=floor), floor) == Close()
    assert move(replace(ready, ends_at=at(100), close_requested=True, barrier_sequence=floor), floor) == Close()


@given(WINDOWS, FLOORS)
def test_no_barrier_is_read_before_the_deadline(window: OpenWindow, floor: int) -> None:
    if move(window, floor) == ReadBarrier():
        assert domain.deadline_passed(window, NOW, grace_s=60, limit_s=300) is None
        assert window.barrier_created != CREATED


CLOSABLE = WINDOWS.map(
    lambda w: replace(
        w, ends_at=min(w.ends_at, at(-60)), barrier_created=CREATED, barrier_sequence=w.barrier_sequence or 0
    )
)


@given(CLOSABLE, FLOORS, st.integers(0, 10), st.integers(0, 1000))
def test_what_may_close_may_close_later_too(window: OpenWindow, floor: int, more: int, later: int) -> None:
    if move(window, floor) == Close():
        assert move(window, floor + more, at(later)) == Close()


def test_each_wait_says_for_what() -> None:
    window = OpenWindow("w", at(-60), barrier_created=CREATED, barrier_sequence=5)
    for waiting, word in (
        (replace(window, ends_at=at(-59.9)), "grace"),
        (replace(window, newest_open_start=at(-299)), "time limit"),
        (replace(window, close_requested=True, newest_open_start=at(-299)), "time limit"),
        (replace(window, last_end_sequence=9), "not all stored"),
        (replace(window, barrier_sequence=9), "not all stored"),
    ):
        verdict = move(waiting, 8)
        assert isinstance(verdict, Wait)
        assert word in verdict.why


@given(st.integers(0, 3000), st.sets(st.integers(0, 3000)), st.integers(1, 100))
def test_every_window_since_the_first_has_a_row_in_the_end(back: int, known: set[int], length_s: int) -> None:
    current = window_at(NOW, length_s)

    def start(n: int) -> datetime:
        return current.starts_at - timedelta(seconds=n * length_s)

    missing = missing_windows(start(back), {start(n) for n in known}, NOW, length_s)
    reach = min(back, domain.IDLE_WINDOWS)
    assert [w.starts_at for w in missing] == [start(n) for n in range(reach, -1, -1) if n not in known]


def test_a_first_window_ahead_of_now_fills_nothing() -> None:
    assert missing_windows(at(7200), [], NOW, 3600) == []
