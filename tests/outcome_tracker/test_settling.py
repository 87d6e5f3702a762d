"""Windows are settled with what is there, say what is not, and are corrected by what comes later."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.outcome_tracker.service import Facts
from services.outcome_tracker.settlement_store import SettlementStore
from services.outcome_tracker.settling import Settling
from services.outcome_tracker.settling_domain import Content, Mark
from services.outcome_tracker.store import OutcomeStore
from shared.aside import Aside
from shared.bus import Bus
from shared.database import Pool
from shared.errors import RetryLaterError
from shared.events import WindowResolved
from tests.outcome_tracker.world import (
    ENDS,
    STARTS,
    WINDOW,
    about,
    add_run,
    add_window,
    closed,
    deliveries,
    delivery,
    knowledge,
    let_time_pass,
    messages,
    metric,
    outcome,
    price,
    resolution,
    resolved,
    reward,
    settled,
    settlement,
    tracker,
    until,
)


# the first time ---------------------------------------------------------------------------------
async def test_a_closed_window_is_settled_with_its_facts_and_announced_once(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a", "b", "c")
    for n, data in enumerate(
        [
            outcome("price", {"symbol": "A", "price": 2, "volume": 3}, STARTS),
            outcome("price", {"symbol": "A", "price": 4}, ENDS - timedelta(microseconds=1)),
            outcome("price", {"symbol": "A", "price": 100}, ENDS),
            outcome("price", {"symbol": "A", "price": 100}, STARTS - timedelta(microseconds=1)),
            price("ZERO", 0),
            knowledge({"window_id": WINDOW}),
            knowledge({"agent_id": "a", "trajectory_id": "t"}),
            reward("a", 1),
            reward("elsewhere", 1),
        ]
    ):
        await bus.publish("outcomes.market", data, str(n))
    await bus.announce(closed())
    made = tracker(pool, bus)
    await made.listen()

    async def announced() -> object:
        await made.settling.tick()
        return await pool.fetchval("select announced_at from settlements")

    await until(announced)
    await made.settling.window_closed(closed())  # a redelivery
    await made.settling.tick()
    await made.settling.announce()

    row = await settlement(pool)
    empty: dict[str, Any] = {"volume": None, "sentiment": None, "news": []}
    assert row["facts"]["prices"] == {
        "A": {**empty, "first": 2, "last": 4, "change": 1, "volume": 3},
        "ZERO": {**empty, "first": 0, "last": 0, "change": None},
    }
    assert row["facts"]["knowledge"] == 2
    [event] = await resolved(bus)
    assert event == WindowResolved(
        window_id=WINDOW,
        starts_at=STARTS,
        ends_at=ENDS,
        close_revision=1,
        revision=1,
        outcomes=6,
        missing=["reward of 2 runs"],
    )


async def test_a_window_waits_for_its_barrier_and_not_for_later_facts(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await bus.publish("outcomes.market", metric("m", 1), "1")
    made = tracker(pool, bus)
    await made.settling.window_closed(closed())
    await made.settling.tick()
    assert (await settlement(pool))["state"] == "waiting"
    await bus.publish("outcomes.market", metric("m", 1), "2")
    await made.settling.tick()
    row = await settlement(pool)
    assert (row["state"], row["barrier_sequence"]) == ("waiting", 1)
    await made.listen()

    async def is_settled() -> bool:
        await made.settling.tick()
        return (await settlement(pool))["state"] == "settled"

    await until(is_settled)
    row = await settlement(pool)
    assert (row["barrier_sequence"], row["missing"]) == (1, [])


async def test_a_window_waits_its_time_and_at_last_no_longer(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    await bus.publish("outcomes.market", b"never read", "1")
    made = tracker(pool, bus, settle_min_s=100, settle_max_s=1000)
    await made.settling.window_closed(closed())
    await made.settling.tick()
    assert (await settlement(pool))["barrier_sequence"] is None, "the barrier is read after settle_min_s, not before"
    await pool.execute("update settlements set wait_from = now() - interval '999 seconds'")
    await made.settling.tick()
    row = await settlement(pool)
    assert (row["state"], row["barrier_sequence"]) == ("waiting", 1)
    await pool.execute("update settlements set wait_from = now() - interval '1000 seconds'")
    await made.settling.tick()
    [event] = await resolved(bus)
    assert event.missing == ["the barrier (1 outcomes are not read yet)", "reward of 1 run"]
    assert event.outcomes == 0


async def test_an_idle_window_is_resolved_too(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await settled(pool, bus)
    [event] = await resolved(bus)
    assert (event.outcomes, event.missing, event.contradictions, event.changed) == (0, [], [], [])


EXPECTED = ["reward", "fact:reopened", "price:IRON", "metric:index", "resolution:m-1", "knowledge"]


async def test_a_window_waits_for_what_its_runs_expect(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await add_run(pool, "a", expects=EXPECTED)
    await add_run(pool, "b", expects=["reward"])
    await add_run(pool, "careless")
    await add_run(pool, "late", late=True, expects=["price:NEVER"])
    made = tracker(pool, bus)
    await made.settling.window_closed(closed())
    facts = [
        reward("a", 1),
        about("a", "reopened", 0, minute=5000),
        price("IRON", 1),
        metric("index", 1),
        resolution("m-1", "yes", minute=300),
        knowledge({"agent_id": "a", "trajectory_id": "t"}),
        reward("b", 0),
    ]
    elsewhere = [price("IRON", 1, minute=60), metric("index", 1, minute=-1), resolution("m-1", "yes", minute=-1)]
    await made.facts.take_in(deliveries(*elsewhere, about("b", "reopened", 1)))
    for n, fact in enumerate(facts, 100):
        await made.settling.tick()
        assert (await settlement(pool))["state"] == "waiting", f"before fact {n}"
        await made.facts.take_in([delivery(fact, n)])
    await made.settling.tick()
    [event] = await resolved(bus)
    assert (event.missing, event.outcomes) == (["reward of 1 run"], 8)
    row = await settlement(pool)
    assert row["facts"]["resolutions"]["m-1"]["outcome"] == "yes", "expected: it counts although it came later"


async def test_what_is_expected_and_never_comes_is_said(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await add_run(pool, "a", expects=EXPECTED)
    await add_run(pool, "b", expects=["fact:reopened"])
    made = tracker(pool, bus, settle_max_s=1000)
    await made.settling.window_closed(closed())
    await made.settling.tick()
    assert (await settlement(pool))["state"] == "waiting"
    await pool.execute("update settlements set wait_from = now() - interval '1000 seconds'")
    await made.settling.tick()
    [event] = await resolved(bus)
    assert event.missing == [
        "fact:reopened of 2 runs",
        "knowledge",
        "metric:index",
        "price:IRON",
        "resolution:m-1",
        "reward of 2 runs",
    ]


async def test_two_replicas_settle_once_and_a_settlement_is_never_overwritten(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    first, second = tracker(pool, bus), tracker(pool, bus)
    await first.settling.window_closed(closed())
    await asyncio.gather(first.settling.tick(), second.settling.tick())
    before = await settlement(pool)
    assert before["state"] == "settled"
    assert len(await resolved(bus)) == 1
    store = SettlementStore(pool)
    async with store.looking_at(WINDOW, "waiting") as held:
        assert held is None
    async with pool.acquire() as connection:
        assert not await store.settle(WINDOW, 1, Content({"prices": "other"}, 9, ("all",)), connection)
    assert await store.set_barrier(WINDOW, 1, Mark(STARTS, 99)) == Mark(
        before["barrier_created"], before["barrier_sequence"]
    )
    assert (await settlement(pool))["facts"] == before["facts"]


class Broken:
    async def announce(self, event: object) -> None:
        raise RetryLaterError("the broker is away")


async def test_what_was_settled_and_not_announced_is_swept(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    made = tracker(pool, bus)
    await made.settling.window_closed(closed())
    made.settling.outbox = Broken()
    with pytest.raises(RetryLaterError):
        await made.settling.tick()
    row = await settlement(pool)
    assert (row["state"], row["announced_at"]) == ("settled", None)
    await tracker(pool, bus).settling.announce()
    assert len(await resolved(bus)) == 1
    assert (await settlement(pool))["announced_at"] is not None


async def test_a_window_that_nobody_knows_is_a_dead_letter(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await bus.announce(closed("2026-11-20T11:00"))
    await bus.announce(closed())
    await tracker(pool, bus).listen()

    async def waiting_and_dead() -> object:
        return await pool.fetchval("select count(*) from settlements") and await messages(bus, "DEAD")

    await until(waiting_and_dead)
    assert b"2026-11-20T11:00" in (await messages(bus, "DEAD"))[0]


async def test_one_window_that_cannot_be_settled_holds_up_no_other(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await add_window(pool, window_id="2026-11-20T09:00", starts_at=STARTS - timedelta(hours=1))

    class Picky(SettlementStore):
        async def settle(self, window_id: str, *more: Any) -> bool:
            if window_id == "2026-11-20T09:00":
                raise ZeroDivisionError
            return await super().settle(window_id, *more)

    made = tracker(pool, bus)
    aside = Aside("outcome_tracker", pool)
    settling = Settling(Picky(pool), made.settling.stream, bus, made.settling.settings, aside=aside)
    await settling.window_closed(closed("2026-11-20T09:00"))
    await settling.window_closed(closed())
    await settling.tick()
    assert [event.window_id for event in await resolved(bus)] == [WINDOW]
    [note] = await pool.fetch("select kind, key, reason from set_aside")
    assert tuple(note) == ("settle window", "2026-11-20T09:00", "ZeroDivisionError")


# contradictions ---------------------------------------------------------------------------------
async def test_resolutions_that_disagree_are_stored_flagged_and_said(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    same = outcome("metric", {"name": "index", "value": 1}, event_id="019aa000-0000-7000-8000-000000000001")
    other = same.replace(b'"value": 1', b'"value": 2')
    facts = (resolution("m", "yes", 1), resolution("m", "no", 2), resolution("n", "yes"), same, other)
    await settled(pool, bus, *facts)
    assert await pool.fetchval("select count(*) from outcomes where name = 'm'") == 2
    found = (await settlement(pool))["facts"]
    assert found["resolutions"]["m"]["outcome"] == "no"
    assert found["resolutions"]["m"]["contradicted_by"] == ["yes"]
    assert "contradicted_by" not in found["resolutions"]["n"]
    assert found["metrics"]["index"]["value"] == 1
    [event] = await resolved(bus)
    assert event.contradictions == [
        "resolution:m: 2 outcomes were told; the last one counts",
        "metric:index: an event id came again with other content; the first one counts",
    ]


async def test_a_later_window_that_is_told_otherwise_corrects_the_earlier_one(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    made = await settled(pool, bus, resolution("m", "yes", 1))
    await add_window(pool, window_id="2026-11-20T11:00", starts_at=ENDS)
    await made.facts.take_in([delivery(resolution("m", "no", 61), 2)])
    await let_time_pass(pool, 60)
    await made.settling.tick()
    first, second = await resolved(bus)
    assert (first.contradictions, second.changed) == ([], ["resolution:m", "contradictions"])
    found = (await settlement(pool, 2))["facts"]["resolutions"]["m"]
    assert (found["outcome"], found["contradicted_by"]) == ("yes", ["no"])


# corrections ------------------------------------------------------------------------------------
LATER = {
    "price": (price("A", 9, minute=50), ["price:A"]),
    "resolution": (resolution("m", "yes"), ["resolution:m"]),
    "expected resolution": (resolution("expected", "yes", minute=5000), ["resolution:expected"]),
    "metric": (metric("m", 1), ["metric:m"]),
    "reward": (reward("a", 1, minute=5000), ["reward"]),
    "fact": (about("a", "reopened", 1, minute=5000), ["fact"]),
    "knowledge": (knowledge({"window_id": WINDOW}, why=1), ["knowledge"]),
    "knowledge of a run": (knowledge({"agent_id": "a", "trajectory_id": "t"}, why=1), ["knowledge"]),
}


@pytest.mark.parametrize("what", LATER)
async def test_a_later_fact_that_changes_what_was_settled_is_a_new_revision(pool: Pool, bus: Bus, what: str) -> None:
    fact, changed = LATER[what]
    await add_window(pool)
    await add_run(pool, "a", expects=["resolution:expected"])
    made = await settled(pool, bus, price("A", 1), settle_max_s=0.0)
    before = await settlement(pool)
    await made.facts.take_in([delivery(fact, 2)])
    await made.settling.tick()
    assert len(await resolved(bus)) == 1, "facts gather for a while first"
    await let_time_pass(pool, 60)
    await made.settling.tick()
    await made.settling.tick()
    first, second = await resolved(bus)
    assert (first.revision, second.revision, second.changed) == (1, 2, changed)
    assert second.outcomes == first.outcomes + 1
    assert dict(await settlement(pool)) == {**before, "announced_at": (await settlement(pool))["announced_at"]}
    assert (await settlement(pool, 2))["changed"] == changed
    assert await pool.fetchval("select count(*) from corrections_due") == 0


async def test_a_correction_may_also_be_that_a_fact_was_contradicted(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    fact = reward("a", 1)
    made = await settled(pool, bus, fact)
    for _ in range(2):
        await made.facts.take_in([delivery(fact.replace(b'"value": 1', b'"value": 2'), 2)])
        await let_time_pass(pool, 1000)
        await made.settling.tick()
    _, second = await resolved(bus)
    assert second.changed == ["contradictions"]
    assert second.contradictions[0].startswith("1 facts about runs")


IDLE = {
    "the same fact again": (price("A", 1, minute=1), 1),
    "a price between": (price("A", 5, minute=2), 2),
    "another window's": (price("A", 1, minute=60), 3),
    "an older reward": (reward("a", 0, minute=1), 4),
    "another's": (reward("elsewhere", 1), 5),
    "a late run's": (reward("late", 1), 6),
}
SETTLED_WITH = (IDLE["the same fact again"][0], price("A", 1, minute=3), reward("a", 1, minute=9))


@pytest.mark.parametrize("what", IDLE)
async def test_what_changes_nothing_makes_no_revision(pool: Pool, bus: Bus, what: str) -> None:
    await add_window(pool, "a")
    await add_run(pool, "late", late=True)
    made = await settled(pool, bus, *SETTLED_WITH)
    await made.facts.take_in([delivery(IDLE[what][0], 9)])
    await let_time_pass(pool, 1e6)
    await made.settling.tick()
    assert len(await resolved(bus)) == 1
    assert await pool.fetchval("select count(*) from corrections_due") == 0


async def test_many_late_facts_are_one_correction_and_the_next_waits_longer(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a", "b", "c")
    made = await settled(pool, bus)
    await made.facts.take_in([delivery(reward("a", 1), 2)])
    await made.facts.take_in([delivery(reward("b", 1), 3)])
    await let_time_pass(pool, 60)
    await made.settling.tick()
    assert [event.missing for event in await resolved(bus)] == [["reward of 3 runs"], ["reward of 1 run"]]
    await made.facts.take_in([delivery(reward("c", 1), 4)])
    await let_time_pass(pool, 119)
    await made.settling.tick()
    assert len(await resolved(bus)) == 2
    await let_time_pass(pool, 1)
    await made.settling.tick()
    assert [event.revision for event in await resolved(bus)] == [1, 2, 3]


async def test_facts_that_come_too_late_are_kept_and_correct_nothing(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    made = await settled(pool, bus, correct_within_s=0)
    await made.facts.take_in([delivery(reward("a", 1), 2)])
    await let_time_pass(pool, 1e6)
    await made.settling.tick()
    assert len(await resolved(bus)) == 1
    assert await pool.fetchval("select count(*) from corrections_due") == 0
    assert await pool.fetchval("select reward from rewards") == 1


async def test_a_fact_that_is_stored_while_a_window_is_corrected_is_not_lost(pool: Pool, bus: Bus) -> None:
    """The correction has read the facts already: the new one notes the window anew once the correction is done."""
    await add_window(pool, "a")
    made = await settled(pool, bus)
    await made.facts.take_in([delivery(reward("a", 1), 2)])
    await let_time_pass(pool, 1000)
    has_read, may_go_on = asyncio.Event(), asyncio.Event()

    class Slow(SettlementStore):
        async def correct(self, *of: Any) -> int:
            has_read.set()
            await may_go_on.wait()
            return await super().correct(*of)

    slow = Settling(Slow(pool), made.settling.stream, bus, made.settling.settings)
    correcting = asyncio.create_task(slow.tick())
    await has_read.wait()
    storing = asyncio.create_task(made.facts.take_in([delivery(reward("a", 2, minute=1), 3)]))
    await until(lambda: waits_or_is_done(pool, storing))
    may_go_on.set()
    await asyncio.gather(correcting, storing)
    await let_time_pass(pool, 1000)
    await made.settling.tick()
    assert [event.changed for event in await resolved(bus)] == [[], ["reward"], ["reward"]]


async def test_a_fact_whose_commit_is_slow_is_waited_for(pool: Pool, bus: Bus) -> None:
    """It has found the window noted already: its note must not be taken off before the fact itself can be seen."""
    await add_window(pool, "a")
    made = await settled(pool, bus)
    await made.facts.take_in([delivery(reward("a", 1), 2)])
    await let_time_pass(pool, 1000)
    has_noted, may_commit = asyncio.Event(), asyncio.Event()

    class Slow(OutcomeStore):
        async def _touch(self, *of: Any) -> None:
            await super()._touch(*of)
            has_noted.set()
            await may_commit.wait()

    storing = asyncio.create_task(Facts(Slow(pool)).take_in([delivery(reward("a", 2, minute=1), 3)]))
    await has_noted.wait()
    correcting = asyncio.create_task(made.settling.tick())
    await until(lambda: waits_or_is_done(pool, correcting))
    may_commit.set()
    await asyncio.gather(correcting, storing)
    await let_time_pass(pool, 1000)
    await made.settling.tick()
    assert await pool.fetchval("select array_agg(outcomes order by revision) from settlements") == [0, 2]


async def waits_or_is_done(pool: Pool, task: asyncio.Task[Any]) -> bool:
    """Whether a task waits for a lock of the database, or got past where it should."""
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    return task.done() or bool(await pool.fetchval(waiting))


async def test_two_replicas_correct_once(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    made = await settled(pool, bus)
    await made.facts.take_in([delivery(reward("a", 1), 2)])
    await let_time_pass(pool, 60)
    await asyncio.gather(*(tracker(pool, bus).settling.tick() for _ in range(3)))
    assert [event.revision for event in await resolved(bus)] == [1, 2]


# the order of arrival ---------------------------------------------------------------------------
ARRIVING = [
    price("A", 1, minute=1),
    price("A", 2, minute=1, volume=0.1, sentiment=0.2),
    price("A", 3, minute=1, volume=0.2, news="up"),
    price("A", 0, minute=2, volume=0.3, sentiment=-1),
    price("B", 0, minute=2),
    resolution("m", "yes", minute=1),
    resolution("m", "no", minute=1),
    resolution("expected", "yes", minute=90),
    metric("index", 1, minute=1),
    metric("index", 2, minute=1),
    reward("a", 1, minute=1),
    reward("a", 2, minute=1),
    about("a", "reopened", 1),
    knowledge({"window_id": WINDOW}, why=1),
    knowledge({"window_id": WINDOW}, why=2),
]


@pytest.fixture(scope="module")
def first() -> dict[str, str]:
    """What the first order that was tried came to."""
    return {}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(ARRIVING), st.integers(0, len(ARRIVING)), st.integers(1, 5))
async def test_the_order_of_arrival_does_not_change_what_a_window_comes_to(
    pool: Pool, bus: Bus, first: dict[str, str], arrived: list[bytes], before: int, batch: int
) -> None:
    """Whatever comes before the settlement and whatever after: the newest settlement is the same."""
    await _forget_all(pool)
    await add_window(pool)
    await add_run(pool, "a", expects=["resolution:expected"])
    made = await settled(pool, bus, *arrived[:before], settle_max_s=0.0)
    rest = arrived[before:]
    for n in range(0, len(rest), batch):
        await made.facts.take_in(deliveries(*rest[n : n + batch], first=1000 + n))
    await let_time_pass(pool, 1e6)
    await made.settling.tick()
    row = await pool.fetchrow("select * from settlements order by revision desc limit 1")
    assert row is not None
    found = {name: row[name] for name in ("facts", "outcomes", "missing", "contradictions", "digests")}
    found["reward"] = await pool.fetchval("select reward from rewards where agent_id = 'a'")
    assert json.dumps(found) == first.setdefault("order", json.dumps(found))


async def _forget_all(pool: Pool) -> None:
    await pool.execute("truncate corrections_due, settlements, trajectories, windows, outcomes cascade")
