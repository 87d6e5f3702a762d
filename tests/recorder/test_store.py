"""A batch in a real Postgres: twice, reordered, in conflict, hostile."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import permutations, product
from uuid import UUID

import pytest
from ratchet_sdk.events import uuid7

from services.recorder.store import EventStore
from shared.bodies import unpacked
from shared.database import Pool
from shared.errors import GiveUpError
from tests.recorder.events import (
    START,
    WINDOW_ID,
    WINDOW_S,
    call_made,
    encoded,
    ended,
    numbered,
    received,
    reply,
    started,
    step,
)
from tests.recorder.rows import RUN, SENT, empty, everything, keep, one


async def test_any_order_any_batches_and_any_repetition_give_the_same_rows(pool: Pool) -> None:
    assert await keep(pool, RUN) == {}
    expected = await everything(pool)
    assert [len(rows) for rows in expected.values()] == [1, 1, 1, 1, 4, 1]
    kept_on = EventStore(pool)  # it remembers runs, even those whose rows are emptied away below
    for order, store in product(list(permutations(RUN))[::5], (None, kept_on)):
        await empty(pool)
        for item in order:
            assert not (await (store or EventStore(pool)).keep([item], WINDOW_S)).dead
        assert not (await (store or EventStore(pool)).keep(order[::-1], WINDOW_S)).dead
        assert await keep(pool, [*order, *order]) == {}
        assert await everything(pool) == expected


async def test_what_is_stored_is_what_was_sent(pool: Pool) -> None:
    texts = {"prompt": "a\u0000b", "emoji": "🦜", "nested": [{"x": None}]}
    event = step(0, environment=texts, action={"type": "say", "error": "\u0000'; drop table bodies; --"})
    await keep(pool, [received(event, 1)])
    body = await one(pool, "bodies")
    assert unpacked(body["body"]) == encoded(event)
    assert body["size_bytes"] == len(encoded(event))
    assert body["sha256"] == received(event, 1).sha256
    assert (await one(pool, "steps"))["answered"] is True


async def test_rows_say_what_operators_ask_for(pool: Pool) -> None:
    await keep(pool, RUN)
    run = await one(pool, "trajectories")
    assert (run["window_id"], run["scenario_id"], run["policy"]) == (WINDOW_ID, "sunny", "default")
    assert (run["model_name"], run["model_version"]) == ("traders", "v1")
    assert run["expects"] == ["fact:a\u2028b", "price:IRON, forged", "reward"]
    assert (run["status"], run["step_count"], run["late"], run["clock_skewed"]) == ("completed", 1, False, False)
    assert run["started_at"] == START
    row = await one(pool, "steps")
    assert (row["action_type"], row["answered"], row["reward"]) == ("buy", True, 0.5)
    call = await one(pool, "llm_calls")
    assert (call["recorded"], call["purpose"], call["has_token_ids"]) == (True, "reasoning", True)
    assert (call["prompt_tokens"], call["model_version"], call["event_id"]) == (3, "v1", RUN[1].event.event_id)
    agent = await one(pool, "seen_agents")
    assert (agent["agent_id"], agent["first_seen"], agent["versions"]) == ("a", START, ["v1"])


async def test_a_call_that_was_only_referred_to_waits_for_its_content(pool: Pool) -> None:
    await keep(pool, [RUN[2]])
    call = await one(pool, "llm_calls")
    assert (call["recorded"], call["event_id"]) == (False, RUN[2].event.event_id)
    await keep(pool, [RUN[1]])
    call = await one(pool, "llm_calls")
    assert (call["recorded"], call["event_id"], call["purpose"]) == (True, RUN[1].event.event_id, "reasoning")


async def test_what_the_gateway_saw_stays_the_call_in_any_order(pool: Pool) -> None:
    claimed = call_made("c", response=reply("invented", token_ids=[9]), prompt_token_ids=[8], model_version="v9")
    told = step(0, llm_calls=[{"call_id": "c", "response": reply("told"), "purpose": "reasoning", "model": "mine"}])
    run = numbered(claimed, call_made("c", response=reply("seen"), model="traders"), told)
    run[1] = run[1]._replace(witnessed=True)
    expected: dict[str, object] = {"witnessed": True, "recorded": True, "event_id": run[1].event.event_id}
    expected |= {"has_token_ids": False, "model": "traders", "model_version": None, "purpose": "reasoning"}
    for order in permutations(run):
        await empty(pool)
        for item in order:
            assert await keep(pool, [item]) == {}
        assert await keep(pool, order[::-1]) == {}
        call = await one(pool, "llm_calls")
        assert {name: call[name] for name in expected} == expected
        bodies = await pool.fetch("select witnessed from bodies order by sequence")
        assert [row["witnessed"] for row in bodies] == [False, True, False]


async def test_the_second_of_two_steps_is_dead_and_leaves_nothing(pool: Pool) -> None:
    first, second = step(0, reward=1), step(0, reward=2, llm_calls=[{"call_id": "x"}])
    good = step(1)
    dead = await keep(pool, numbered(first, second, good))
    assert dead == {2: "another event is stored for this step of the run"}
    assert [row["reward"] for row in await pool.fetch("select reward from steps order by step")] == [1.0, None]
    assert await pool.fetchval("select count(*) from bodies") == 2
    assert await pool.fetchval("select count(*) from llm_calls") == 0
    assert list(await keep(pool, [received(second, 7)])) == [7]
    assert await keep(pool, [received(first, 8)]) == {}


async def test_an_event_id_with_other_content_is_dead(pool: Pool) -> None:
    first = step(0)
    second = step(1).model_copy(update={"event_id": first.event_id})
    dead = await keep(pool, numbered(first, second))
    assert dead == {2: "its event_id is already stored with other content"}
    assert await pool.fetchval("select count(*) from steps") == 1
    assert list(await keep(pool, [received(step(0, "u").model_copy(update={"event_id": first.event_id}), 3)])) == [3]
    assert await pool.fetchval("select count(*) from trajectories") == 1
    assert await keep(pool, [received(second, 4, agent_id="b")]) == {}  # another agent's ids are its own


@pytest.mark.parametrize("milliseconds", [0, 4_070_908_800_000, 253_402_300_799_999])
async def test_an_absurd_day_is_kept_like_any_other(pool: Pool, milliseconds: int) -> None:
    event_id = UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62)
    assert await keep(pool, [received(step(0).model_copy(update={"event_id": event_id}), 1)]) == {}
    assert await pool.fetchval("select count(*) from bodies_default") == 1


async def test_a_run_keeps_its_first_window_whatever_it_says_later(pool: Pool) -> None:
    moved = {"started_at": START + timedelta(minutes=3)}
    await keep(pool, [received(step(0), 1)])
    await keep(pool, [received(started(scenario_id=None, **moved), 2), received(ended(**moved), 3)])
    run = await one(pool, "trajectories")
    assert (run["window_id"], run["scenario_id"], run["started_at"]) == (WINDOW_ID, WINDOW_ID, START)
    assert (run["started"], run["status"]) == (True, "completed")
    assert await pool.fetchval("select count(*) from windows") == 1


async def test_a_value_that_postgres_refuses_is_said_as_that(pool: Pool) -> None:
    await pool.execute("alter table steps add check (action_type <> 'poison')")
    with pytest.raises(GiveUpError, match="CheckViolation"):
        await keep(pool, numbered(step(0), step(1, action={"type": "poison"})))
    assert await pool.fetchval("select count(*) from bodies") == 0


async def test_versions_of_an_agent_are_bounded(pool: Pool) -> None:
    for first in (0, 80):
        versions = [{"call_id": f"c{n}", "model_version": f"v{n}"} for n in range(first, first + 80)]
        await keep(pool, [received(step(first, llm_calls=versions), first + 1)])
    assert 80 <= len((await one(pool, "seen_agents"))["versions"]) <= 200


async def test_two_recorders_with_the_same_batch_do_not_disturb_each_other(pool: Pool) -> None:
    events = [
        item
        for agent in range(10)
        for item in (
            received(event.model_copy(update={"event_id": uuid7()}), agent * 10 + n, f"a{agent}")
            for n, event in enumerate(SENT)
        )
    ]
    results = await asyncio.gather(*(keep(pool, batch) for batch in (events, events[::-1], events)))
    assert results == [{}, {}, {}]
    assert await pool.fetchval("select count(*) from bodies") == 40
