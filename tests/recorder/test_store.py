"""A batch in a real Postgres: twice, reordered, in conflict, hostile; and windows from open to closed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations, product
from typing import Any
from uuid import UUID

import pytest
from ratchet_sdk.events import uuid7

from services.recorder.domain import Received
from services.recorder.store import EventStore
from shared.database import Pool, Record
from shared.errors import GiveUpError
from shared.streams import Barrier
from shared.windows import window_of_id
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

CREATED = datetime(2026, 11, 1, tzinfo=UTC)
TABLES = ("windows", "trajectories", "steps", "llm_calls", "bodies", "seen_agents")
VOLATILE = {"received_at", "first_stored_at"}


async def keep(pool: Pool, events: Sequence[Received]) -> dict[int, str]:
    return dict((await EventStore(pool).keep(events, WINDOW_S)).dead)


async def everything(pool: Pool) -> dict[str, list[dict[str, Any]]]:
    return {
        table: sorted(
            ({k: v for k, v in row.items() if k not in VOLATILE} for row in await pool.fetch(f"select * from {table}")),
            key=repr,
        )
        for table in TABLES
    }


async def empty(pool: Pool) -> None:
    await pool.execute(f"truncate {', '.join(TABLES)} cascade")


async def one(pool: Pool, table: str) -> Record:
    [row] = await pool.fetch(f"select * from {table}")
    return row


RUN = numbered(
    started(scenario_id="sunny", model={"name": "traders", "version": "v1"}),
    call_made("c", response=reply(token_ids=[1]), prompt_token_ids=[2], model_version="v1", usage={"prompt_tokens": 3}),
    step(0, llm_calls=[{"call_id": "c", "purpose": "reasoning"}], action={"type": "buy", "result": 1}, reward=0.5),
    ended(),
)


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
    assert zlib.decompress(body["body"]) == encoded(event)
    assert body["size_bytes"] == len(encoded(event))
    assert body["sha256"] == received(event, 1).sha256
    assert (await one(pool, "steps"))["answered"] is True


async def test_rows_say_what_operators_ask_for(pool: Pool) -> None:
    await keep(pool, RUN)
    run = await one(pool, "trajectories")
    assert (run["window_id"], run["scenario_id"], run["policy"]) == (WINDOW_ID, "sunny", "default")
    assert (run["model_name"], run["model_version"]) == ("traders", "v1")
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


# windows ----------------------------------------------------------------------------------------
LATER = START + timedelta(hours=2)


async def close(pool: Pool, *, floor: int = 100, barrier: int = 50, opened_before: datetime = LATER) -> Record | None:
    store = EventStore(pool)
    await store.write_barrier(WINDOW_ID, Barrier(CREATED, barrier))
    return await store.close(WINDOW_ID, floor=floor, opened_before=opened_before)


async def test_a_window_is_closed_once_and_counted(pool: Pool) -> None:
    await keep(pool, [*RUN, received(started("open"), 9, "b")])
    closed = await close(pool)
    assert closed is not None
    assert (closed["agents"], closed["trajectories"], closed["late"], closed["quality"]) == (2, 2, 0, 0.5)
    assert await close(pool) is None
    statuses = await pool.fetch("select trajectory_id, status from trajectories order by 1")
    assert [tuple(row) for row in statuses] == [("open", "truncated"), ("t", "completed")]
    [row] = await EventStore(pool).unannounced()
    assert (row["window_id"], row["revision"]) == (WINDOW_ID, 1)
    await EventStore(pool).announced(WINDOW_ID, 1)
    assert await EventStore(pool).unannounced() == []


@pytest.mark.parametrize(
    "wrong",
    [{"floor": 49}, {"floor": 100, "barrier": 101}, {"opened_before": START - timedelta(seconds=1)}],
)
async def test_a_window_that_moved_since_the_decision_stays_open(pool: Pool, wrong: dict[str, Any]) -> None:
    await keep(pool, [received(started("open"), 9)])
    assert await close(pool, **wrong) is None
    assert (await one(pool, "windows"))["state"] == "open"
    assert (await one(pool, "trajectories"))["status"] == "open"


async def test_an_end_beyond_the_barrier_is_waited_for(pool: Pool) -> None:
    await keep(pool, [received(started(), 9), received(ended(), 90)])
    [due] = await EventStore(pool).due(LATER)
    assert (due.last_end_sequence, due.newest_open_start) == (90, None)
    assert await close(pool, floor=89) is None
    assert await close(pool, floor=90) is not None


async def test_late_is_what_lies_beyond_the_barrier_and_nothing_else(pool: Pool) -> None:
    store = EventStore(pool)
    before, beyond = received(started("before"), 50), received(started("beyond"), 51)
    await keep(pool, [received(started("first"), 1), received(started("unmarked"), 60)])
    await store.write_barrier(WINDOW_ID, Barrier(CREATED, 50))
    kept = await store.keep([beyond, before], WINDOW_S)
    assert (kept.new_late, kept.closed) == (1, frozenset())
    late = await pool.fetch("select trajectory_id from trajectories where late order by 1")
    assert [row[0] for row in late] == ["beyond", "unmarked"]
    closed = await close(pool)
    assert closed is not None
    assert (closed["trajectories"], closed["late"]) == (2, 2)

    kept = await store.keep([received(started("after", scenario_id="s"), 200)], WINDOW_S)
    assert (kept.new_late, kept.closed) == (1, frozenset({WINDOW_ID}))
    await store.recount_late(kept.closed)
    window = await one(pool, "windows")
    assert (window["trajectories"], window["late"], window["revision"]) == (2, 3, 1)


async def test_a_closed_window_keeps_its_scenarios_and_its_verdicts(pool: Pool) -> None:
    await keep(pool, [received(step(0), 1)])
    assert await close(pool) is not None
    await keep(pool, [received(started(scenario_id="other"), 200), received(ended(), 201)])
    run = await one(pool, "trajectories")
    assert (run["scenario_id"], run["status"], run["late"]) == (WINDOW_ID, "truncated", False)


async def test_an_event_that_came_first_after_all_is_not_late(pool: Pool) -> None:
    await keep(pool, [received(started("other"), 1)])
    await EventStore(pool).write_barrier(WINDOW_ID, Barrier(CREATED, 50))
    await keep(pool, [received(step(0), 60)])
    await keep(pool, [received(started(), 40)])
    assert await pool.fetchval("select late from trajectories where trajectory_id = 't'") is False


async def test_a_barrier_is_written_once_for_a_stream(pool: Pool) -> None:
    store = EventStore(pool)
    await keep(pool, RUN)
    for sequence in (50, 70):
        await store.write_barrier(WINDOW_ID, Barrier(CREATED, sequence))
        assert (await one(pool, "windows"))["barrier_sequence"] == 50
    anew = CREATED + timedelta(days=1)
    await store.write_barrier(WINDOW_ID, Barrier(anew, 2))
    window = await one(pool, "windows")
    assert (window["barrier_created"], window["barrier_sequence"]) == (anew, 2)
    assert (await store.due(LATER))[0].last_end_sequence == 0
    assert await pool.fetchval("select late from trajectories") is False


async def test_a_store_that_is_not_committed_holds_the_barrier_up(pool: Pool) -> None:
    store = EventStore(pool)
    await store.make_windows([window_of_id(WINDOW_ID)])
    async with pool.acquire() as connection, connection.transaction():
        await store._keep(connection, [received(started(), 60)], WINDOW_S)
        writing = asyncio.create_task(store.write_barrier(WINDOW_ID, Barrier(CREATED, 50)))
        while not await pool.fetchval("select count(*) from pg_locks where not granted"):
            await asyncio.sleep(0.01)
        assert not writing.done()
    await writing
    assert await pool.fetchval("select late from trajectories") is True


async def test_due_are_ended_windows_and_those_asked_for(pool: Pool) -> None:
    store = EventStore(pool)
    await keep(pool, [received(started(), 1)])
    end = window_of_id(WINDOW_ID).ends_at
    assert await store.due(end - timedelta(seconds=1)) == []
    assert [w.window_id for w in await store.due(end)] == [WINDOW_ID]
    asked = window_of_id("2026-11-20T10:05~60s")
    assert await store.request_close(asked) == "open"
    [due] = await store.due(end - timedelta(seconds=1))
    assert (due.window_id, due.close_requested, due.newest_open_start) == (asked.window_id, True, None)


async def test_quality_is_the_share_of_checks_that_hold(pool: Pool) -> None:
    def run(name: str, *, call: bool = True, answer: bool = True, steps: int = 1, said: int | None = 1) -> list[Any]:
        action = {"type": "buy", "result": 1} if answer else {"type": "buy"}
        calls = [{"call_id": "c", "response": reply()}] if call else []
        events: list[Any] = [step(n, name, action=action, llm_calls=calls) for n in range(steps)]
        return events if said is None else [*events, ended(name, step_count=said)]

    cases = {
        "whole": (run("whole"), 1.0),
        "silent": (run("silent", call=False), 0.75),
        "unanswered": (run("unanswered", call=False, answer=False), 0.5),
        "missing": (run("missing", said=3), 0.75),
        "empty": (run("empty", steps=0, said=0), 0.0),
        "cut": (run("cut", said=None), 1.0),
    }
    for number, (name, (events, expected)) in enumerate(cases.items()):
        await empty(pool)
        await keep(pool, numbered(*events, first=number * 10 + 1))
        closed = await close(pool, barrier=100)
        assert closed is not None
        assert closed["quality"] == pytest.approx(expected), name
    await empty(pool)
    await EventStore(pool).make_windows([window_of_id(WINDOW_ID)])
    closed = await close(pool)
    assert closed is not None
    assert (closed["trajectories"], closed["quality"]) == (0, None)


async def test_late_runs_that_never_end_are_truncated(pool: Pool) -> None:
    store = EventStore(pool)
    await store.make_windows([window_of_id(WINDOW_ID)])
    assert await close(pool) is not None
    await keep(pool, [received(started(), 200)])
    await store.truncate_late(3600)
    assert (await one(pool, "trajectories"))["status"] == "open"
    await store.truncate_late(0)
    assert (await one(pool, "trajectories"))["status"] == "truncated"


async def test_two_recorders_with_the_same_batch_do_not_disturb_each_other(pool: Pool) -> None:
    events = [
        item
        for agent in range(10)
        for item in (
            received(e.event.model_copy(update={"event_id": uuid7()}), agent * 10 + n, f"a{agent}")
            for n, e in enumerate(RUN)
        )
    ]
    results = await asyncio.gather(*(keep(pool, batch) for batch in (events, events[::-1], events)))
    assert results == [{}, {}, {}]
    assert await pool.fetchval("select count(*) from bodies") == 40
