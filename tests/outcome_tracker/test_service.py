"""Facts come in over a real broker: each is stored once, and what is bad is dead with its reason, alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import nats
import pytest
from prometheus_client import REGISTRY

from services.local.agent_keys import kept_key
from services.local.broker import WORLD
from services.local.embedded import NatsServer
from services.outcome_tracker.domain import CONTRADICTION, FactRow
from services.outcome_tracker.service import Facts
from services.outcome_tracker.store import OutcomeStore
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Ack, Dead
from shared.streams import ack_floor
from tests.outcome_tracker.world import (
    STARTS,
    WINDOW,
    add_window,
    deliveries,
    delivery,
    knowledge,
    messages,
    metric,
    outcome,
    price,
    reasons,
    reward,
    tracker,
    until,
)

SAME = "019aa000-0000-7000-8000-000000000001"


def bad(fault: str) -> float:
    return REGISTRY.get_sample_value("ratchet_bad_outcomes_total", {"fault": fault}) or 0.0


async def all_read(bus: Bus, count: int) -> None:
    async def read() -> bool:
        return await ack_floor(bus, subjects.TRACKER_OUTCOMES) >= count

    await until(read)


async def test_bad_facts_are_dead_with_their_reasons_and_their_neighbours_are_stored(pool: Pool, bus: Bus) -> None:
    same = outcome("metric", {"name": "m", "value": 1}, event_id=SAME)
    ahead = outcome("metric", {"name": "m", "value": 2}, datetime.now(UTC) + timedelta(minutes=6))
    before_time = metric("m", 3).replace(b"2026-11-20T10:00:00+00:00", b"0001-01-01T00:00:00+14:00")
    sent: list[tuple[bytes, str | None]] = [
        (same, None),
        (b"not json", "Invalid JSON"),
        (same.replace(b'"event_id"', b'"other_id"'), "event_id: a fact without one"),
        (outcome("rumour", {"x": 1}), "does not match any of the expected tags"),
        (price("A", float("nan")), "price.price.price: Input should be a finite number"),
        (price("A", 1, volume=float("-inf")), "price.price.volume: Input should be a finite number"),
        (price("A", 1, volume=-1), "price.price.volume: Input should be greater than or equal to 0"),
        (knowledge({"window_id": WINDOW}, x=float("nan")), "a number is not finite"),
        (knowledge({}, x=1), "knowledge must name a window_id"),
        (ahead, "s ahead of the broker's clock"),
        (knowledge({"window_id": WINDOW}, why="a\0b"), None),
        (before_time, "outside the years 1 to 9999"),
        (same, None),
        (same.replace(b'"value": 1', b'"value": 2'), CONTRADICTION),
        (reward("a", 0.5), None),
    ]
    for n, (data, _) in enumerate(sent):
        await bus.publish("outcomes.market", data, str(n))
    await bus.publish("outcomes.other", same, "same id, other source")
    await bus.publish("outcomes.two.tokens", same, "no source")
    faults = {fault: bad(fault) for fault in ("not finite", "contradiction", "from the future", "negative volume")}
    await tracker(pool, bus).listen()
    await all_read(bus, len(sent) + 2)
    rows = await pool.fetch("select source, kind, name, value, data, contradicted from outcomes order by sequence")
    assert [(row["source"], row["kind"], row["name"], row["value"]) for row in rows] == [
        ("market", "metric", "m", 1.0),
        ("market", "knowledge", None, None),
        ("market", "trajectory", "reward", 0.5),
        ("other", "metric", "m", 1.0),
    ]
    assert [row["contradicted"] for row in rows] == [True, False, False, False]
    assert rows[1]["data"]["data"] == {"why": "a\N{REPLACEMENT CHARACTER}b"}
    assert sorted(await messages(bus, "DEAD")) == sorted([*(data for data, why in sent if why), same])
    said = await reasons(bus)
    for why in [*(why for _, why in sent if why), "names no source"]:
        assert sum(why in reason for reason in said) == 1, why
    assert await pool.fetchval("select reward from rewards where agent_id = 'a'") == 0.5
    assert {fault: bad(fault) - before for fault, before in faults.items()} == {
        "not finite": 3,
        "contradiction": 1,
        "from the future": 1,
        "negative volume": 1,
    }


async def test_facts_with_an_agents_credentials_are_refused_and_the_worlds_are_stored(
    pool: Pool, bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    seed = tmp_path / "agent-1.nk"
    nats_server.admit({"agent-1": kept_key(seed)})
    faults: list[str] = []

    async def note(error: Exception) -> None:
        faults.append(str(error).lower())

    agent = await nats.connect(nats_server.address, nkeys_seed=str(seed), inbox_prefix="_INBOX_agent-1", error_cb=note)
    world = await nats.connect(nats_server.url_of(WORLD))
    try:
        for reply in ("", "_INBOX_agent-1.x", "window.resolved"):
            await agent.publish("outcomes.market", reward("agent-1", 1e9), reply=reply)
        while agent.pending_data_size or len(faults) < 3:
            await agent.flush()
        await world.jetstream().publish("outcomes.market", reward("agent-1", 0.1))
    finally:
        await agent.close()
        await world.close()
    assert faults == ['nats: permissions violation for publish to "outcomes.market"'] * 3
    await tracker(pool, bus).listen()
    await all_read(bus, 1)
    assert await pool.fetchval("select array_agg(value) from outcomes") == [0.1]
    assert await messages(bus, "LOOP") == []


async def test_what_the_database_alone_refuses_is_dead_alone(pool: Pool) -> None:
    class Picky(OutcomeStore):
        """Postgres' own error for a bad value, for the whole batch that holds the fact that has it."""

        async def add(self, facts: Sequence[FactRow]) -> frozenset[int]:
            for fact in facts:
                await self.pool.execute("select $1::text::jsonb", "broken" if fact.name == "odd" else "{}")
            return await super().add(facts)

    names = ["a", "b", "odd", "c", "d", "odd", "e"]
    verdicts = await Facts(Picky(pool)).take_in(deliveries(*(metric(name, 1) for name in names)))
    assert [isinstance(verdict, Dead) for verdict in verdicts] == [name == "odd" for name in names]
    assert await pool.fetchval("select string_agg(name, '' order by sequence) from outcomes") == "abcde"


async def test_a_batch_handled_twice_is_stored_once(pool: Pool) -> None:
    service = Facts(OutcomeStore(pool))
    batch = deliveries(*(reward("a", n, minute=n) for n in range(3)))
    assert await service.take_in(batch) == await service.take_in(batch) == [Ack()] * 3
    assert await pool.fetchval("select count(*) from outcomes") == 3
    assert await pool.fetchval("select reward from rewards") == 2


async def test_the_reward_of_record_is_the_last_by_its_own_time_however_it_comes(pool: Pool) -> None:
    """Also where the stream was made anew meanwhile and counts from 1 again."""
    service = Facts(OutcomeStore(pool))

    def told(value: float, second: int, n: int) -> bytes:
        content = {"agent_id": "a", "trajectory_id": "t", "name": "reward", "value": value}
        event_id = f"019aa000-0000-7000-8000-{n:012d}"
        return outcome("trajectory", content, STARTS + timedelta(seconds=second), event_id)

    first, second, corrected = told(1, 1, 1), told(2, 1, 2), told(3, 2, 0)
    for n, fact in enumerate([corrected, second, first]):
        await service.take_in([delivery(fact, 100 - n)])
    assert await pool.fetchval("select reward from rewards") == 3
    await pool.execute("delete from outcomes where value = 3")
    assert await pool.fetchval("select reward from rewards") == 2, "of one instant, the one that was made last"


async def test_one_id_with_two_contents_in_one_batch_keeps_the_first_and_marks_it(pool: Pool) -> None:
    service = Facts(OutcomeStore(pool))
    fact = outcome("metric", {"name": "m", "value": 1}, event_id=SAME)
    batch = deliveries(fact, fact, fact.replace(b'"value": 1', b'"value": 9'), metric("other", 5))
    for _ in range(2):
        verdicts = await service.take_in(batch)
        assert verdicts == [Ack(), Ack(), Dead(CONTRADICTION), Ack()]
    rows = await pool.fetch("select name, value, contradicted from outcomes order by name")
    assert [tuple(row) for row in rows] == [("m", 1, True), ("other", 5, False)]


@pytest.mark.parametrize("change", [{"kind": "metric2"}, {"note": "new"}, {"occurred_at": "2026-11-20T10:00:01Z"}])
async def test_other_content_is_what_is_stored_otherwise(pool: Pool, change: dict[str, str]) -> None:
    service = Facts(OutcomeStore(pool))
    fact = json.loads(outcome("metric", {"name": "m", "value": 1}, event_id=SAME))
    again = {**fact, **change, "metric": {**fact["metric"], "value": 1.0}}
    [_, verdict] = await service.take_in(deliveries(json.dumps(fact).encode(), json.dumps(again).encode()))
    assert isinstance(verdict, Dead)
    same = {**dict(reversed(fact.items())), "occurred_at": "2026-11-20T11:00:00+01:00"}
    assert await service.take_in(deliveries(json.dumps(same).encode())) == [Ack()]


async def test_a_lost_database_is_no_verdict_on_a_fact(pool: Pool) -> None:
    service = Facts(OutcomeStore(pool))
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await service.take_in([delivery(reward("a", 1))])


async def test_a_forgotten_run_s_fact_that_comes_again_contradicts_nothing(pool: Pool) -> None:
    """Its words are gone from what is stored: it is compared by what is left, and none of them comes back."""
    await add_window(pool, "a")
    service = Facts(OutcomeStore(pool))
    content = {"agent_id": "a", "trajectory_id": "t", "name": "reward", "value": 1, "note": "the words"}
    fact = outcome("trajectory", content, event_id=SAME).replace(b'"schema"', b'"more": "words", "schema"')
    known = knowledge({"agent_id": "a", "trajectory_id": "t"}, why="words")
    await service.take_in(deliveries(fact, known))
    await pool.execute("insert into forgotten_runs (agent_id, trajectory_id, who) values ('a', 't', 'test')")
    assert await service.forget([("a", "t")]) == {"facts": 2}
    assert await service.forget([("a", "t")]) == {"facts": 0}
    assert await service.take_in(deliveries(fact, known)) == [Ack(), Ack()]
    moved = fact.replace(b"10:00:00", b"10:00:01")
    assert await service.take_in(deliveries(moved, reward("a", 2, minute=1))) == [Dead(CONTRADICTION), Ack()]
    rows = await pool.fetch("select kind, value, data::text || extra::text as words from outcomes order by value")
    assert [(row["kind"], row["value"]) for row in rows] == [("trajectory", 1), ("trajectory", 2), ("knowledge", None)]
    assert not [row for row in rows if "words" in row["words"]]
