"""Days that are over: partitions made ahead, erased for those whose life is short, dropped for all."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from ratchet_sdk.events import Step

from services.recorder.domain import Received
from services.recorder.retention import Retention
from services.recorder.retention_store import RetentionStore, partition_of
from services.recorder.settings import RecorderSettings
from shared.database import Pool
from shared.trajectories import load
from tests.recorder.events import received
from tests.recorder.rows import keep
from tests.recorder.test_retention_domain import id_of

TODAY = date(2026, 11, 20)


def ago(days: int) -> date:
    return TODAY - timedelta(days=days)


def run(trajectory_id: str, *days: date, policy: str = "default", sequence: int = 1) -> list[Received]:
    """A step on each of these days."""
    first = datetime(days[0].year, days[0].month, days[0].day, tzinfo=UTC)
    events: list[Any] = [
        Step(
            trajectory_id=trajectory_id,
            policy=policy,
            started_at=first,
            occurred_at=first,
            step=number,
            event_id=id_of(day, hash((trajectory_id, number)) % 2**32),
        )
        for number, day in enumerate(days)
    ]
    return [received(event, sequence + number) for number, event in enumerate(events)]


def retention(pool: Pool, days: int = 0, today: date = TODAY, **by_policy: int) -> Retention:
    settings = RecorderSettings(retention_days=days, retention_days_by_policy=by_policy)
    return Retention(RetentionStore(pool), settings, lambda: today)


async def bodies(pool: Pool) -> dict[str, list[bool]]:
    """By run, for each of its rows in the order of its steps, whether the body is there."""
    found: dict[str, list[bool]] = {}
    for row in await pool.fetch("select trajectory_id, body is not null as there from bodies order by sequence"):
        found.setdefault(row["trajectory_id"], []).append(row["there"])
    return found


async def partitions(pool: Pool) -> list[str]:
    return [partition_of(day) for day in await RetentionStore(pool).partitions()]


async def test_without_a_setting_nothing_is_partitioned_and_nothing_goes(pool: Pool) -> None:
    await keep(pool, run("old", ago(900)))
    await retention(pool).round()
    await retention(pool, posters=0).round()
    assert await partitions(pool) == []
    assert await bodies(pool) == {"old": [True]}


async def test_days_get_partitions_ahead_and_what_was_there_moves_in(pool: Pool) -> None:
    await keep(pool, [*run("before", ago(1)), *run("today", TODAY, sequence=2)])
    await retention(pool, 7).round()
    days = [ago(1), TODAY, ago(-1), ago(-2)]
    assert await partitions(pool) == [partition_of(day) for day in days]
    await keep(pool, run("later", ago(-1), sequence=3))
    assert await keep(pool, run("today", TODAY, sequence=4)) == {}  # known in its new place too
    where = await pool.fetch("select trajectory_id, tableoid::regclass::text as name from bodies order by 1")
    assert {row["trajectory_id"]: row["name"] for row in where} == {
        "before": partition_of(ago(1)),
        "today": partition_of(TODAY),
        "later": partition_of(ago(-1)),
    }
    stays = await pool.fetch(
        "select attstattarget from pg_attribute where attname = 'body' and attstattarget is not null"
    )
    assert {row["attstattarget"] for row in stays} == {0}


async def test_a_day_that_is_over_for_all_is_dropped_with_tombstones_left(pool: Pool) -> None:
    await keep(
        pool, [*run("gone", ago(8)), *run("spans", ago(8), ago(7), sequence=5), *run("stays", ago(7), sequence=9)]
    )
    await retention(pool, 8).round()
    assert await bodies(pool) == {"gone": [True], "spans": [True, True], "stays": [True]}
    await retention(pool, 7).round()
    assert partition_of(ago(8)) not in await partitions(pool)
    assert await bodies(pool) == {"spans": [False], "stays": [True]}
    stones = await pool.fetch("select trajectory_id, who, events, reason from forgotten_runs order by 1")
    assert [(row["trajectory_id"], row["who"], row["events"]) for row in stones] == [
        ("gone", "retention", 1),
        ("spans", "retention", 2),
    ]
    assert await pool.fetchval("select count(*) from trajectories") == 3
    assert await pool.fetchval("select count(*) from steps") == 4
    assert list(await load(pool, [("a", name) for name in ("gone", "spans", "stays")])) == [("a", "stays")]


async def test_a_policy_with_a_shorter_life_is_erased_and_the_day_stays_for_the_other(pool: Pool) -> None:
    await keep(pool, [*run("short", ago(5), policy="traders"), *run("long", ago(5), sequence=2)])
    await keep(pool, run("ever", ago(5), policy="posters", sequence=3))
    await retention(pool, 10, traders=3, posters=0).round()
    assert await bodies(pool) == {"short": [False], "long": [True], "ever": [True]}
    assert partition_of(ago(5)) in await partitions(pool)
    later = ago(-10)
    await retention(pool, 10, today=later, traders=3, posters=0).round()
    assert await bodies(pool) == {"short": [False], "long": [False], "ever": [True]}


async def test_an_event_of_a_dropped_day_is_not_stored_again(pool: Pool) -> None:
    known, unknown = run("known", ago(8)), run("unknown", ago(8), sequence=2)
    await keep(pool, known)
    await retention(pool, 8).round()
    await retention(pool, 7).round()
    dead = await keep(pool, [*known, *unknown, *run("new", TODAY, sequence=3)])
    assert {sequence: "past its retention" in why for sequence, why in dead.items()} == {2: True}
    assert await bodies(pool) == {"new": [True]}
    await retention(pool, 0).round()  # whatever the setting becomes
    assert list(await keep(pool, [*known, *unknown])) == [2]
    assert await bodies(pool) == {"new": [True]}
    assert await pool.fetchval("select count(*) from trajectories where trajectory_id = 'unknown'") == 0


async def test_a_policys_own_days_begin_where_all_stood(pool: Pool) -> None:
    await retention(pool, 7).round()
    await retention(pool, 7, traders=30).round()
    assert list(await keep(pool, run("t", ago(9), policy="traders"))) == [1]
    gone = await RetentionStore(pool).gone_through()
    assert gone == {"": ago(8), "traders": ago(8)}
    await retention(pool, 3, traders=30).round()
    assert await RetentionStore(pool).gone_through() == {"": ago(4), "traders": ago(8)}
    assert await keep(pool, run("t", ago(5), policy="traders")) == {}


async def test_what_was_there_before_any_partition_expires_where_it_lies(pool: Pool) -> None:
    await keep(pool, run("old", ago(900)))
    await retention(pool, 7).round()
    assert await bodies(pool) == {"old": [False]}
    assert len(await partitions(pool)) == 3
    assert await keep(pool, run("old", ago(900))) == {}
    assert await bodies(pool) == {"old": [False]}


async def test_hostile_ids_make_no_partitions_and_expire_by_their_arrival(pool: Pool) -> None:
    arrived = datetime.now(UTC).date()
    days = [date(1971, 1, 1), date(2999, 1, 1), date(9000, 1, 1), date(2031, 5, 5)]
    for number, day in enumerate(days):
        await keep(pool, run(f"t{number}", day, sequence=number + 1))
    await retention(pool, 7, today=arrived).round()
    assert len(await partitions(pool)) == 3
    assert await bodies(pool) == {"t0": [False], "t1": [True], "t2": [True], "t3": [True]}
    await retention(pool, 7, today=arrived + timedelta(days=8)).round()
    assert {there for rows in (await bodies(pool)).values() for there in rows} == {False}
    assert len(await partitions(pool)) <= 6


async def test_a_round_that_was_cut_off_is_finished_by_the_next(pool: Pool) -> None:
    await keep(pool, [*run("one", ago(8)), *run("two", ago(8), sequence=2)])
    await retention(pool, 8).round()

    class CutOff(RetentionStore):
        async def drop(self, day: date) -> None:
            raise ConnectionError("cut off")

    settings = RecorderSettings(retention_days=7)
    with pytest.raises(ConnectionError):
        await Retention(CutOff(pool), settings, lambda: TODAY).round()
    assert partition_of(ago(8)) in await partitions(pool)
    assert await load(pool, [("a", "one"), ("a", "two")]) == {}
    await retention(pool, 7).round()
    assert await bodies(pool) == {}
    assert await pool.fetchval("select sum(events) from forgotten_runs") == 2


async def test_replicas_take_turns_and_recorders_go_on(pool: Pool) -> None:
    await keep(pool, [item for n in range(40) for item in run(f"old{n}", ago(8), sequence=n + 1)])
    await retention(pool, 8).round()
    storing = [keep(pool, run(f"new{n}", ago(n % 3), sequence=100 + n)) for n in range(40)]
    rounds = [retention(pool, 7).round() for _ in range(3)]
    results = await asyncio.gather(*rounds, *storing)
    assert [dead for dead in results if dead] == []
    await retention(pool, 7).round()
    assert sorted(await bodies(pool)) == sorted(f"new{n}" for n in range(40))
