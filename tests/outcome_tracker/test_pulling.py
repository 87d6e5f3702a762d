"""What pull sources hold comes in where the world's facts do, once, while a window waits and when it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.outcome_tracker.pull_domain import Pulled
from services.outcome_tracker.source_csv import CsvSource
from services.outcome_tracker.sync import Sync
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.errors import GiveUpError, RetryLaterError
from shared.streams import ack_floor
from tests.outcome_tracker.world import (
    ENDS,
    STARTS,
    WINDOW,
    Tracker,
    add_run,
    add_window,
    closed,
    deliveries,
    messages,
    price,
    reasons,
    resolved,
    reward,
    settlement,
    tracker,
    until,
)

HEAD = "id,kind,occurred_at,name,value,symbol,price,agent_id,trajectory_id"
PRICE = "p1,price,2026-11-20T10:01:00Z,,,IRON,2,,"
METRIC = ",metric,2026-11-20T10:02:00Z,index,7,,,,"
REWARD = ",trajectory,2026-11-20T14:00:00Z,reward,0.5,,,a,t"
BAD = ",metric,2026-11-20T10:03:00Z,index,NaN,,,,"


class Down:
    """A source that answers when it is told to."""

    name = "down"
    reason: str | None = "it answered 503"
    asked = 0

    async def pull(self, starts_at: datetime, ends_at: datetime) -> AsyncIterator[list[Pulled]]:
        self.asked += 1
        if self.reason:
            raise RetryLaterError(self.reason)
        yield []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.csv"
    write(path, PRICE, METRIC)
    return path


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join([HEAD, *lines]) + "\n")


async def pull_again(pool: Pool, made: Tracker) -> None:
    await pool.execute("update settlements set pull_at = now()")
    await made.pulling.tick()


async def stored(pool: Pool, bus: Bus, count: int) -> None:
    """And acknowledged: a barrier beyond them is reached."""

    async def there() -> bool:
        kept = await pool.fetchval("select count(*) from outcomes")
        return bool(kept >= count and await ack_floor(bus, subjects.TRACKER_OUTCOMES) >= count)

    await until(there)


async def test_sources_are_read_while_a_window_waits_and_each_row_is_one_fact(pool: Pool, bus: Bus, file: Path) -> None:
    await add_window(pool)
    await add_run(pool, "a", expects=["reward", "metric:index"])
    made = tracker(pool, bus, sources=[CsvSource("desk", str(file))])
    await made.listen()
    await made.settling.window_closed(closed())
    await made.pulling.tick()
    await made.pulling.tick()
    await stored(pool, bus, 2)
    for _ in range(2):
        await pull_again(pool, made)
    await made.settling.tick()
    assert (await settlement(pool))["state"] == "waiting", "the reward is expected"
    write(file, METRIC, REWARD, PRICE)
    await pull_again(pool, made)
    await stored(pool, bus, 3)

    async def is_settled() -> bool:
        await made.settling.tick()
        return (await settlement(pool))["state"] == "settled"

    await until(is_settled)
    assert len(await messages(bus, "OUTCOMES")) == 3, "what is stored is not published again"
    found = await settlement(pool)
    assert (found["facts"]["prices"]["IRON"]["last"], found["facts"]["metrics"]["index"]["value"]) == (2, 7)
    assert found["pulled"] == {"desk": None}
    assert await pool.fetchval("select array_agg(distinct source) from outcomes") == ["desk"]
    [event] = await resolved(bus)
    assert (event.missing, event.outcomes) == ([], 3)


async def test_a_source_that_fails_holds_the_window_and_no_other_source(pool: Pool, bus: Bus, file: Path) -> None:
    await add_window(pool)
    down = Down()
    made = tracker(pool, bus, sources=[down, CsvSource("desk", str(file))], settle_max_s=1000)
    await made.listen()
    await made.settling.window_closed(closed())
    await made.settling.tick()
    await made.pulling.tick()
    await stored(pool, bus, 2)
    await made.settling.tick()
    assert (await settlement(pool))["state"] == "waiting"
    await pool.execute("update settlements set wait_from = now() - interval '1000 seconds'")
    await made.settling.tick()
    [event] = await resolved(bus)
    assert event.missing == ["source down (it answered 503)"]


async def test_a_source_that_was_read_once_may_fail_afterwards(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    down = Down()
    made = tracker(pool, bus, sources=[down])
    await made.settling.window_closed(closed())
    await made.pulling.tick()
    await made.settling.tick()
    assert (await settlement(pool))["pulled"] == {"down": "it answered 503"}
    down.reason = None
    await pull_again(pool, made)
    down.reason = "it answered 500"
    await pull_again(pool, made)
    await made.settling.tick()
    assert down.asked == 3
    [event] = await resolved(bus)
    assert event.missing == []


async def test_two_replicas_share_the_reading(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    down = Down()
    replicas = [tracker(pool, bus, sources=[down]) for _ in range(3)]
    await replicas[0].settling.window_closed(closed())
    await asyncio.gather(*(replica.pulling.tick() for replica in replicas))
    assert down.asked == 1


async def test_bad_rows_are_dead_letters_once_and_their_neighbours_facts(pool: Pool, bus: Bus, file: Path) -> None:
    await add_window(pool)
    write(file, BAD, PRICE, ",rumour,2026-11-20T10:03:00Z,,,,,,", METRIC, ",metric,yesterday,index,1,,,,")
    made = tracker(pool, bus, sources=[CsvSource("desk", str(file))])
    await made.listen()
    for _ in range(2):
        tally = await made.pulling.pull(STARTS, ENDS)
        assert (tally.read, tally.bad_count, tally.faults) == (2, 3, {"desk": None})
        await stored(pool, bus, 2)
    said = await reasons(bus)
    assert len(said) == 3
    for where, reason in (("line 2", "finite number"), ("line 4", "'rumour'"), ("line 6", "a time with its zone")):
        assert sum(f"facts.csv {where}: " in one and reason in one for one in said) == 1


async def test_a_row_that_changes_under_its_id_contradicts_itself_once(pool: Pool, bus: Bus, file: Path) -> None:
    await add_window(pool)
    made = tracker(pool, bus, sources=[CsvSource("desk", str(file))])
    await made.listen()
    await made.pulling.pull(STARTS, ENDS)
    await stored(pool, bus, 2)
    write(file, PRICE.replace(",2,", ",3,"), METRIC)
    await made.pulling.pull(STARTS, ENDS)

    async def marked() -> object:
        return await pool.fetchval("select bool_or(contradicted) from outcomes")

    await until(marked)
    assert (await made.pulling.pull(STARTS, ENDS)).published == 0
    assert len(await reasons(bus)) == 1
    assert await pool.fetchval("select value from outcomes where name = 'IRON'") == 2


async def test_a_source_with_a_bug_says_so_and_stops_nothing(pool: Pool, bus: Bus, file: Path) -> None:
    class Buggy(Down):
        name = "buggy"

        async def pull(self, starts_at: datetime, ends_at: datetime) -> AsyncIterator[list[Pulled]]:
            raise ZeroDivisionError
            yield []

    made = tracker(pool, bus, sources=[Buggy(), CsvSource("desk", str(file))])
    tally = await made.pulling.pull(STARTS, ENDS)
    assert tally.faults == {"buggy": "ZeroDivisionError: see the tracker's log", "desk": None}
    assert tally.published == 2


# past windows -----------------------------------------------------------------------------------
async def test_past_windows_are_filled_from_sources_and_from_what_is_stored(pool: Pool, bus: Bus, file: Path) -> None:
    """One was settled without its facts long ago, one never began to wait, one is open."""
    await add_window(pool, "a")
    await add_window(pool, window_id="2026-11-20T11:00", starts_at=ENDS)
    await add_window(pool, window_id="2026-11-20T12:00", starts_at=ENDS + timedelta(hours=1))
    await pool.execute("update windows set state = 'open' where window_id = '2026-11-20T12:00'")
    write(file, PRICE, METRIC, REWARD, BAD)
    made = tracker(pool, bus, correct_within_s=0)
    await made.facts.take_in(deliveries(price("TEA", 1)))
    await made.settling.window_closed(closed())
    await made.settling.tick()
    await pool.execute("delete from corrections_due")

    filled = tracker(pool, bus, sources=[CsvSource("desk", str(file))], correct_within_s=0)
    await filled.listen()
    until_late = STARTS + timedelta(hours=5)
    plan = await bus.command("outcome_tracker", "sync_plan", {"from": STARTS.isoformat(), "to": until_late.isoformat()})
    assert (plan["windows"], plan["open"], plan["sources"]) == (2, 1, ["desk"])
    assert [part["windows"] for part in plan["chunks"]] == [1, 1]
    replies = [
        await bus.command("outcome_tracker", "sync", {"from": part["from"], "to": part["to"]})
        for part in plan["chunks"]
    ]
    first, second = replies
    assert first["corrected"] == [{"window_id": WINDOW, "revision": 2, "changed": ["price:IRON", "metric:index"]}]
    assert (first["facts_read"], first["facts_published"], first["bad_rows"]) == (2, 2, 1)
    assert (first["waiting"], second["waiting"], second["facts_published"]) == (0, 1, 1)
    assert "finite number" in first["bad"][0]["reason"]
    assert first["incomplete"] == [{"window_id": WINDOW, "missing": ["reward of 1 run"]}]

    again = await bus.command("outcome_tracker", "sync", {"from": STARTS.isoformat(), "to": until_late.isoformat()})
    assert again["corrected"] == [{"window_id": WINDOW, "revision": 3, "changed": ["reward"]}]
    assert again["facts_published"] == 0
    last = await bus.command("outcome_tracker", "sync", {"from": STARTS.isoformat(), "to": until_late.isoformat()})
    assert last["corrected"] == []
    await filled.settling.tick()
    states = await pool.fetch("select window_id, max(revision) as revision from settlements group by 1 order by 1")
    assert [tuple(row) for row in states] == [(WINDOW, 3), ("2026-11-20T11:00", 1)]
    assert [(event.window_id, event.revision) for event in await resolved(bus)] == [
        (WINDOW, 1),
        (WINDOW, 2),
        (WINDOW, 3),
        ("2026-11-20T11:00", 1),
    ]


async def test_a_settlement_is_filled_from_what_was_stored_and_came_too_late(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    made = tracker(pool, bus, correct_within_s=0)
    await made.settling.window_closed(closed())
    await made.settling.tick()
    await made.facts.take_in(deliveries(reward("a", 1)))
    await made.settling.tick()
    found = await made.sync.sync(STARTS, ENDS)
    assert found["corrected"] == [{"window_id": WINDOW, "revision": 2, "changed": ("reward",)}]


@pytest.mark.parametrize(
    "wrong", [{}, {"from": "2026-11-20T10:00:00", "to": "2026-11-21T10:00:00Z"}, {"from": 1, "to": []}]
)
async def test_a_wrong_request_is_answered_with_what_is_wrong(pool: Pool, bus: Bus, wrong: dict[str, Any]) -> None:
    await tracker(pool, bus).listen()
    with pytest.raises(GiveUpError, match="wrong request: "):
        await bus.command("outcome_tracker", "sync", wrong)
    with pytest.raises(GiveUpError, match="before it begins"):
        await bus.command("outcome_tracker", "sync", {"from": ENDS.isoformat(), "to": STARTS.isoformat()})


async def test_facts_that_nobody_stores_are_said(
    pool: Pool, bus: Bus, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.outcome_tracker.sync.STORED_WITHIN_S", 0.2)
    await add_window(pool)
    made = tracker(pool, bus, sources=[CsvSource("desk", str(file))])
    assert isinstance(made.sync, Sync)
    with pytest.raises(RetryLaterError, match="run the same command again"):
        await made.sync.sync(STARTS, datetime.now(UTC))
