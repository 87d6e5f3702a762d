"""The outcome tracker on a real broker and a real database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from ratchet_sdk.events import uuid7

from services.outcome_tracker.domain import Mark
from services.outcome_tracker.handlers import subscribe
from services.outcome_tracker.service import OutcomeTracker
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.store import OutcomeStore
from services.outcome_tracker.stream import OutcomeStream
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Ack, Dead, Delivery
from shared.errors import RetryLaterError
from shared.events import WindowClosed, WindowResolved
from shared.streams import ack_floor

STARTS = datetime(2026, 11, 20, 10, tzinfo=UTC)
WINDOW = "2026-11-20T10:00"


def outcome(kind: str, content: dict[str, Any], occurred_at: datetime = STARTS, event_id: str | None = None) -> bytes:
    head = {"schema": 1, "event_id": event_id or str(uuid7()), "occurred_at": occurred_at.isoformat()}
    return json.dumps({**head, "kind": kind, kind: content}).encode()


def reward(agent_id: str, value: float) -> bytes:
    return outcome("trajectory", {"agent_id": agent_id, "trajectory_id": "t", "name": "reward", "value": value})


def delivery(data: bytes, sequence: int = 1, subject: str = "outcomes.market") -> Delivery:
    return Delivery(subject, data, {}, sequence, datetime.now(UTC), 1)


async def add_window(pool: Pool, *agents: str) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state, revision, closed_at)
           values ($1, $2, $3, 3600, 'closed', 1, now())""",
        WINDOW,
        STARTS,
        STARTS + timedelta(hours=1),
    )
    for agent_id in agents:
        await pool.execute(
            """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,
                                         status, first_sequence)
               values ($1, 't', 'default', $2, 's', $3, 'completed', 1)""",
            agent_id,
            WINDOW,
            STARTS,
        )


def tracker(pool: Pool, bus: Bus, **settings: Any) -> OutcomeTracker:
    settings = {"settle_min_s": 0.0, "settle_max_s": 3600.0, **settings}
    return OutcomeTracker(OutcomeStore(pool), OutcomeStream(bus), bus, TrackerSettings(**settings))


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def messages(bus: Bus, stream: str) -> list[bytes]:
    info = await bus.js.stream_info(stream)
    return [(await bus.js.get_msg(stream, n)).data or b"" for n in range(1, info.state.last_seq + 1)]


async def resolved(bus: Bus) -> list[WindowResolved]:
    found = [json.loads(data) for data in await messages(bus, "LOOP")]
    return [WindowResolved.model_validate(event) for event in found if "close_revision" in event]


def closed(window_id: str = WINDOW) -> WindowClosed:
    ends_at = STARTS + timedelta(hours=1)
    return WindowClosed(window_id=window_id, starts_at=STARTS, ends_at=ends_at, agents=1, trajectories=1, late=0)


async def settlement(pool: Pool) -> asyncpg.Record:
    row = await pool.fetchrow("select * from settlements")
    assert row is not None
    return row


# facts ------------------------------------------------------------------------------------------
async def test_bad_facts_are_dead_and_their_neighbours_are_stored(pool: Pool, bus: Bus) -> None:
    same = outcome("metric", {"name": "m", "value": 1}, event_id="019aa000-0000-7000-8000-000000000001")
    sent = [
        same,
        b"not json",
        same.replace(b'"event_id"', b'"other_id"'),
        outcome("rumour", {"x": 1}),
        outcome("price", {"symbol": "A", "price": "NaN"}),
        outcome("price", {"symbol": "A", "price": 1, "volume": -1}),
        outcome("metric", {"name": "m", "value": 2}, datetime.now(UTC) + timedelta(minutes=6)),
        outcome("knowledge", {"window_id": WINDOW, "data": {"why": "a\0b"}}),
        outcome("metric", {"name": "m", "value": 3}).replace(
            b"2026-11-20T10:00:00+00:00", b"0001-01-01T00:00:00+14:00"
        ),
        same,
        reward("a", 0.5),
    ]
    for n, data in enumerate(sent):
        await bus.publish("outcomes.market", data, str(n))
    await bus.publish("outcomes.other", same, "same id, other source")
    await bus.publish("outcomes.two.tokens", same, "no source")
    service = tracker(pool, bus)
    subscribe(bus, service)
    await bus.broker.start()

    async def all_read() -> bool:
        return await ack_floor(bus, subjects.TRACKER_OUTCOMES) >= len(sent) + 2

    await until(all_read)
    rows = await pool.fetch("select source, kind, name, value, data from outcomes order by sequence")
    assert [(row["source"], row["kind"], row["name"], row["value"]) for row in rows] == [
        ("market", "metric", "m", 1.0),
        ("market", "knowledge", None, None),
        ("market", "trajectory", "reward", 0.5),
        ("other", "metric", "m", 1.0),
    ]
    assert rows[1]["data"]["data"] == {"why": "a\N{REPLACEMENT CHARACTER}b"}
    assert sorted(await messages(bus, "DEAD")) == sorted([*sent[1:7], sent[8], same])
    assert await pool.fetchval("select reward from rewards where agent_id = 'a'") == 0.5


async def test_what_the_database_alone_refuses_is_dead_alone(pool: Pool, bus: Bus) -> None:
    class Picky(OutcomeStore):
        """Postgres' own error for a bad value, for the whole batch that holds the fact that has it."""

        async def add(self, facts: Any) -> None:
            for fact in facts:
                await self.pool.execute("select $1::text::jsonb", "broken" if fact.name == "odd" else "{}")
            await super().add(facts)

    service = OutcomeTracker(Picky(pool), OutcomeStream(bus), bus, TrackerSettings())
    names = ["a", "b", "odd", "c", "d", "odd", "e"]
    batch = [delivery(outcome("metric", {"name": name, "value": 1}), n) for n, name in enumerate(names)]
    verdicts = await service.take_in(batch)
    assert [isinstance(verdict, Dead) for verdict in verdicts] == [name == "odd" for name in names]
    assert await pool.fetchval("select string_agg(name, '' order by sequence) from outcomes") == "abcde"


async def test_a_batch_handled_twice_is_stored_once(pool: Pool, bus: Bus) -> None:
    service = tracker(pool, bus)
    batch = [delivery(reward("a", n), n) for n in range(3)]
    assert await service.take_in(batch) == await service.take_in(batch) == [Ack()] * 3
    assert await pool.fetchval("select count(*) from outcomes") == 3
    assert await pool.fetchval("select reward from rewards") == 2


async def test_a_lost_database_is_no_verdict_on_a_fact(pool: Pool, bus: Bus) -> None:
    service = tracker(pool, bus)
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await service.take_in([delivery(reward("a", 1))])


# windows ----------------------------------------------------------------------------------------
async def test_a_closed_window_is_settled_with_its_facts_and_announced_once(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a", "b", "c")
    ends = STARTS + timedelta(hours=1)
    for n, data in enumerate(
        [
            outcome("price", {"symbol": "A", "price": 2, "volume": 3}, STARTS),
            outcome("price", {"symbol": "A", "price": 4}, ends - timedelta(microseconds=1)),
            outcome("price", {"symbol": "A", "price": 100}, ends),
            outcome("price", {"symbol": "A", "price": 100}, STARTS - timedelta(microseconds=1)),
            outcome("knowledge", {"window_id": WINDOW, "data": {}}, ends),
            outcome("knowledge", {"agent_id": "a", "trajectory_id": "t", "data": {}}, ends),
            reward("a", 1),
            reward("elsewhere", 1),
        ]
    ):
        await bus.publish("outcomes.market", data, str(n))
    await bus.announce(closed())
    service = tracker(pool, bus)
    subscribe(bus, service)
    await bus.broker.start()

    async def announced() -> object:
        await service.tick()
        return await pool.fetchval("select announced_at from settlements")

    await until(announced)
    await service.window_closed(closed())  # a redelivery
    await service.tick()
    await service.announce()

    row = await settlement(pool)
    assert row["facts"]["prices"]["A"] == {
        "first": 2,
        "last": 4,
        "change": 1,
        "volume": 3,
        "sentiment": None,
        "news": [],
    }
    assert row["facts"]["knowledge"] == 2
    [event] = await resolved(bus)
    assert event == WindowResolved(
        window_id=WINDOW,
        starts_at=STARTS,
        ends_at=ends,
        close_revision=1,
        revision=1,
        outcomes=5,
        missing=["reward of 2 runs"],
    )


async def test_a_window_waits_for_its_barrier_and_not_for_later_facts(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await bus.publish("outcomes.market", outcome("metric", {"name": "m", "value": 1}), "1")
    service = tracker(pool, bus)
    await service.window_closed(closed())
    await service.tick()
    assert (await settlement(pool))["state"] == "waiting"
    await bus.publish("outcomes.market", outcome("metric", {"name": "m", "value": 1}), "2")
    await service.tick()
    row = await settlement(pool)
    assert (row["state"], row["barrier_sequence"]) == ("waiting", 1)

    subscribe(bus, service)
    await bus.broker.start()

    async def settled() -> bool:
        await service.tick()
        return (await settlement(pool))["state"] == "settled"

    await until(settled)
    row = await settlement(pool)
    assert (row["barrier_sequence"], row["missing"]) == (1, [])


async def test_a_window_waits_its_time_and_at_last_no_longer(pool: Pool, bus: Bus) -> None:
    await add_window(pool, "a")
    await bus.publish("outcomes.market", b"never read", "1")
    service = tracker(pool, bus, settle_min_s=100, settle_max_s=1000)
    await service.window_closed(closed())
    await service.tick()
    assert (await settlement(pool))["barrier_sequence"] is None, "the barrier is read after settle_min_s, not before"
    await pool.execute("update settlements set wait_from = now() - interval '999 seconds'")
    await service.tick()
    row = await settlement(pool)
    assert (row["state"], row["barrier_sequence"]) == ("waiting", 1)
    await pool.execute("update settlements set wait_from = now() - interval '1000 seconds'")
    await service.tick()
    [event] = await resolved(bus)
    assert event.missing == ["the barrier (1 outcomes are not read yet)", "reward of 1 run"]
    assert event.outcomes == 0


async def test_an_idle_window_is_resolved_too(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    service = tracker(pool, bus)
    await service.window_closed(closed())
    await service.tick()
    [event] = await resolved(bus)
    assert (event.outcomes, event.missing) == (0, [])


async def test_two_replicas_settle_once_and_a_settlement_is_never_overwritten(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    first, second = tracker(pool, bus), tracker(pool, bus)
    await first.window_closed(closed())
    await asyncio.gather(first.tick(), second.tick())
    before = await settlement(pool)
    assert before["state"] == "settled"
    assert len(await resolved(bus)) == 1
    store = OutcomeStore(pool)
    assert not await store.settle(WINDOW, 1, {"prices": "other"}, 9, ["all"])
    assert await store.set_barrier(WINDOW, 1, Mark(STARTS, 99)) == Mark(
        before["barrier_created"], before["barrier_sequence"]
    )
    assert (await settlement(pool))["facts"] == before["facts"]


async def test_what_was_settled_and_not_announced_is_swept(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    service = tracker(pool, bus)
    await service.window_closed(closed())

    class Broken:
        async def announce(self, event: object) -> None:
            raise RetryLaterError("the broker is away")

    service.outbox = Broken()
    with pytest.raises(RetryLaterError):
        await service.tick()
    row = await settlement(pool)
    assert (row["state"], row["announced_at"]) == ("settled", None)
    await tracker(pool, bus).announce()
    assert len(await resolved(bus)) == 1
    assert (await settlement(pool))["announced_at"] is not None


async def test_a_window_that_nobody_knows_is_a_dead_letter(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await bus.announce(closed("2026-11-20T11:00"))
    await bus.announce(closed())
    subscribe(bus, tracker(pool, bus))
    await bus.broker.start()

    async def waiting_and_dead() -> object:
        return await pool.fetchval("select count(*) from settlements") and await messages(bus, "DEAD")

    await until(waiting_and_dead)
    assert b"2026-11-20T11:00" in (await messages(bus, "DEAD"))[0]


async def test_one_window_that_cannot_be_settled_holds_up_no_other(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state)
           values ('2026-11-20T09:00', $1::timestamptz - interval '1 hour', $1, 3600, 'closed')""",
        STARTS,
    )

    class Picky(OutcomeStore):
        async def about_runs(self, window_id: str) -> tuple[int, int, int]:
            if window_id == "2026-11-20T09:00":
                raise ZeroDivisionError
            return await super().about_runs(window_id)

    service = OutcomeTracker(Picky(pool), OutcomeStream(bus), bus, TrackerSettings(settle_min_s=0))
    await service.window_closed(closed("2026-11-20T09:00"))
    await service.window_closed(closed())
    await service.tick()
    assert [event.window_id for event in await resolved(bus)] == [WINDOW]
