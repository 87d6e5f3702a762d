"""When a window is settled, what it lacks, and when a settlement is corrected."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.outcome_tracker.settling_domain import (
    Content,
    Correct,
    Mark,
    Position,
    Settle,
    TakeBarrier,
    TooLate,
    Wait,
    changed,
    correction_move,
    correction_wait_s,
    missing_facts,
    next_move,
    not_pulled,
)
from tests.outcome_tracker.test_joined_domain import MARKET, contradictions, resolution, seen, window_facts

CREATED = datetime(2026, 11, 1, tzinfo=UTC)


# when -------------------------------------------------------------------------------------------
def at(end: int, floor: int, created: datetime = CREATED) -> Position:
    return Position(Mark(created, end), floor)


def test_a_window_is_settled_in_its_order() -> None:
    limits: dict[str, Any] = {"unread": False, "unmet": False, "min_s": 10.0, "max_s": 60.0}
    lacking: dict[str, Any] = {**limits, "unmet": True}
    unread: dict[str, Any] = {**limits, "unread": True}
    mark = Mark(CREATED, 5)
    assert next_move(9.9, None, at(5, 5), **limits) == Wait()
    assert next_move(9.9, mark, at(5, 5), **limits) == Wait()
    assert next_move(10, None, at(5, 5), **limits) == TakeBarrier(mark)
    assert next_move(10, mark, at(9, 4), **limits) == Wait()
    assert next_move(10, mark, at(9, 5), **limits) == Settle()
    assert next_move(59, mark, at(9, 5), **lacking) == Wait()
    assert next_move(59, None, at(5, 5), **lacking) == TakeBarrier(mark)
    assert next_move(59, None, at(5, 5), **unread) == Wait(), "what is pulled must lie before the barrier"
    assert next_move(59, mark, at(5, 5), **unread) == Wait()
    assert next_move(60, None, at(5, 5), **unread) == TakeBarrier(mark)
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
    st.booleans(),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_no_window_is_settled_early_nor_waits_for_ever(
    waited_s: float, end: int, floor: int, known: bool, unread: bool, unmet: bool, min_s: float, more_s: float
) -> None:
    barrier = Mark(CREATED, end) if known else None
    lacks: dict[str, Any] = {"unread": unread, "unmet": unmet}
    move = next_move(waited_s, barrier, at(end, floor), **lacks, min_s=min_s, max_s=min_s + more_s)
    if isinstance(move, Settle):
        assert waited_s >= min_s
        assert barrier is not None
        assert bool(move.missing) == (floor < end)
        assert not (unread or unmet) or waited_s >= min_s + more_s
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


def test_a_source_that_was_not_read_is_missing_with_its_reason() -> None:
    pulled = {"prices": None, "news": "it answered 503"}
    assert not_pulled(["prices", "news", "odds"], pulled) == (
        "source news (it answered 503)",
        "source odds (not asked yet)",
    )
    assert not_pulled([], pulled) == ()


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
