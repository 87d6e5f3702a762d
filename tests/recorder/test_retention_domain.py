"""What passes the gate, and how long days live: rules alone."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from services.recorder.domain import Received, day_of
from services.recorder.retention_domain import (
    AHEAD_DAYS,
    EVERY_OTHER,
    Drop,
    Erase,
    Gate,
    Keep,
    Lives,
    fate,
    last_day_of,
    partitions_wanted,
)
from shared.purging import Held, stays_from
from tests.recorder.events import received, step

TODAY = date(2026, 11, 20)
POLICIES = st.sampled_from(["default", "traders", "posters"])
DAYS = st.integers(-40, 5).map(lambda n: TODAY + timedelta(days=n))


def id_of(day: date, number: int = 0) -> UUID:
    milliseconds = int(datetime(day.year, day.month, day.day, 12, tzinfo=UTC).timestamp() * 1000)
    return UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | number)


def event(day: date, sequence: int = 1, trajectory_id: str = "t", policy: str = "default") -> Received:
    made = step(0, trajectory_id, policy=policy, event_id=id_of(day, sequence))
    return received(made, sequence)


def test_an_event_of_a_forgotten_run_leaves_a_tombstone_and_no_body() -> None:
    gate = Gate(frozenset([("a", "gone")]))
    mine, other = event(TODAY, 1, "gone"), event(TODAY, 2, "t")
    sifted = gate.sift([mine, other])
    assert [(item.sequence, item.packed) for item in sifted.keep] == [(1, None), (2, other.packed)]
    assert (sifted.keep[0].sha256, sifted.keep[0].size_bytes) == (mine.sha256, mine.size_bytes)
    assert sifted.dead == {}
    assert gate.shown({1: "conflict", 2: "conflict"}, [mine, other]) == {2: "conflict"}


def test_an_event_of_a_day_that_is_gone_is_dead_and_of_a_forgotten_run_nothing() -> None:
    gate = Gate(frozenset([("a", "gone")]), {EVERY_OTHER: TODAY})
    sifted = gate.sift([event(TODAY, 1, "gone"), event(TODAY, 2), event(TODAY + timedelta(days=1), 3)])
    assert [item.sequence for item in sifted.keep] == [3]
    assert list(sifted.dead) == [2]
    assert "past its retention" in sifted.dead[2]


@given(st.lists(st.tuples(DAYS, POLICIES), max_size=8), st.dictionaries(POLICIES | st.just(EVERY_OTHER), DAYS))
def test_every_event_is_kept_or_dead_by_its_own_policys_day(
    given_events: list[tuple[date, str]], gone: dict[str, date]
) -> None:
    events = [event(day, n, f"t{n}", policy) for n, (day, policy) in enumerate(given_events)]
    sifted = Gate(frozenset(), gone).sift(events)
    for item in events:
        last = gone.get(item.event.policy, gone.get(EVERY_OTHER))
        expected = last is not None and day_of(item.event.event_id) <= last
        assert (item.sequence in sifted.dead) == expected == (item not in sifted.keep)


@given(st.integers(1, 1000), st.integers(0, 2000))
def test_an_event_is_kept_its_days_whole(days: int, age: int) -> None:
    gone = Lives(days, {}).gone_through(TODAY)[EVERY_OTHER]
    assert gone is not None
    assert (TODAY - timedelta(days=age) <= gone) == (age > days)


def test_policies_may_live_longer_shorter_or_for_ever() -> None:
    lives = Lives(30, {"traders": 7, "posters": 0})
    gone = {policy: day for policy, day in lives.gone_through(TODAY).items() if day}
    assert gone == {EVERY_OTHER: date(2026, 10, 20), "traders": date(2026, 11, 12)}
    assert lives.gone_through(TODAY)["posters"] is None
    assert (lives.bounded, lives.longest_days) == (True, 30)
    assert Lives(0, {"traders": 7}).gone_through(TODAY) == {"traders": date(2026, 11, 12)}
    assert not Lives(0, {"posters": 0}).bounded
    assert last_day_of(gone, "another") == gone[EVERY_OTHER]
    assert last_day_of({}, "another") is None


@given(st.lists(st.dates(), max_size=30), st.integers(1, 60))
def test_partitions_are_few_whatever_ids_claim(in_default: list[date], life: int) -> None:
    wanted = partitions_wanted(TODAY, in_default, TODAY - timedelta(days=life))
    assert {TODAY + timedelta(days=n) for n in range(AHEAD_DAYS + 1)} <= set(wanted)
    assert len(wanted) <= life + 1 + AHEAD_DAYS
    assert wanted == sorted(set(wanted))


def test_the_fate_of_a_day_is_decided_by_who_lives_longest() -> None:
    gone = {EVERY_OTHER: TODAY - timedelta(days=5), "traders": TODAY - timedelta(days=2), "posters": date.min}
    old, recent = TODAY - timedelta(days=6), TODAY - timedelta(days=3)
    assert fate(old, ["default", "traders"], gone) == Drop()
    assert fate(old, ["default", "traders", "posters"], gone) == Erase(("default", "traders"))
    assert fate(recent, ["default", "traders"], gone) == Erase(("traders",))
    assert fate(recent, ["default"], gone) == Keep()
    assert fate(old, [], gone) == Drop()


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60), st.floats(0, 1))
def test_nothing_goes_that_is_not_stored(first: int, floor: int, young: int, filled: float) -> None:
    stays = stays_from(Held(first, filled), floor, young)
    assert stays <= floor + 1
    assert stays <= young or filled >= 0.5
