"""Windows in a real Postgres: from open to closed, once, and what is late."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.recorder.store import EventStore
from services.recorder.window_store import WindowStore
from shared.database import Pool, Record
from shared.streams import Barrier
from shared.windows import window_of_id
from tests.recorder.events import (
    START,
    WINDOW_ID,
    WINDOW_S,
    ended,
    numbered,
    received,
    reply,
    started,
    step,
)
from tests.recorder.rows import RUN, empty, keep, one

CREATED = datetime(2026, 11, 1, tzinfo=UTC)


LATER = START + timedelta(hours=2)


async def close(pool: Pool, *, floor: int = 100, barrier: int = 50, opened_before: datetime = LATER) -> Record | None:
    windows = WindowStore(pool)
    await windows.write_barrier(WINDOW_ID, Barrier(CREATED, barrier))
    return await windows.close(WINDOW_ID, floor=floor, opened_before=opened_before)


async def test_a_window_is_closed_once_and_counted(pool: Pool) -> None:
    await keep(pool, [*RUN, received(started("open"), 9, "b")])
    closed = await close(pool)
    assert closed is not None
    assert (closed["agents"], closed["trajectories"], closed["late"]) == (2, 2, 0)
    assert closed["quality"] == pytest.approx(2 / 5)  # one has no steps, the other's call no prompt
    assert await close(pool) is None
    statuses = await pool.fetch("select trajectory_id, status from trajectories order by 1")
    assert [tuple(row) for row in statuses] == [("open", "truncated"), ("t", "completed")]
    [row] = await WindowStore(pool).unannounced()
    assert (row["window_id"], row["revision"]) == (WINDOW_ID, 1)
    await WindowStore(pool).announced(WINDOW_ID, 1)
    assert await WindowStore(pool).unannounced() == []


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
    [due] = await WindowStore(pool).due(LATER)
    assert (due.last_end_sequence, due.newest_open_start) == (90, None)
    assert await close(pool, floor=89) is None
    assert await close(pool, floor=90) is not None


async def test_late_is_what_lies_beyond_the_barrier_and_nothing_else(pool: Pool) -> None:
    windows = WindowStore(pool)
    before, beyond = received(started("before"), 50), received(started("beyond"), 51)
    await keep(pool, [received(started("first"), 1), received(started("unmarked"), 60)])
    await windows.write_barrier(WINDOW_ID, Barrier(CREATED, 50))
    kept = await EventStore(pool).keep([beyond, before], WINDOW_S)
    assert (kept.new_late, kept.closed) == (1, frozenset())
    late = await pool.fetch("select trajectory_id from trajectories where late order by 1")
    assert [row[0] for row in late] == ["beyond", "unmarked"]
    closed = await close(pool)
    assert closed is not None
    assert (closed["trajectories"], closed["late"]) == (2, 2)

    kept = await EventStore(pool).keep([received(started("after", scenario_id="s"), 200)], WINDOW_S)
    assert (kept.new_late, kept.closed) == (1, frozenset({WINDOW_ID}))
    await EventStore(pool).recount_late(kept.closed)
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
    await WindowStore(pool).write_barrier(WINDOW_ID, Barrier(CREATED, 50))
    await keep(pool, [received(step(0), 60)])
    await keep(pool, [received(started(), 40)])
    assert await pool.fetchval("select late from trajectories where trajectory_id = 't'") is False


async def test_a_barrier_is_written_once_for_a_stream(pool: Pool) -> None:
    windows = WindowStore(pool)
    await keep(pool, RUN)
    for sequence in (50, 70):
        await windows.write_barrier(WINDOW_ID, Barrier(CREATED, sequence))
        assert (await one(pool, "windows"))["barrier_sequence"] == 50
    anew = CREATED + timedelta(days=1)
    await windows.write_barrier(WINDOW_ID, Barrier(anew, 2))
    window = await one(pool, "windows")
    assert (window["barrier_created"], window["barrier_sequence"]) == (anew, 2)
    assert (await windows.due(LATER))[0].last_end_sequence == 0
    assert await pool.fetchval("select late from trajectories") is False


async def test_a_store_that_is_not_committed_holds_the_barrier_up(pool: Pool) -> None:
    windows = WindowStore(pool)
    await windows.make_windows([window_of_id(WINDOW_ID)])
    async with pool.acquire() as connection, connection.transaction():
        await EventStore(pool)._keep(connection, [received(started(), 60)], WINDOW_S)
        writing = asyncio.create_task(windows.write_barrier(WINDOW_ID, Barrier(CREATED, 50)))
        while not await pool.fetchval("select count(*) from pg_locks where not granted"):
            await asyncio.sleep(0.01)
        assert not writing.done()
    await writing
    assert await pool.fetchval("select late from trajectories") is True


async def test_due_are_ended_windows_and_those_asked_for(pool: Pool) -> None:
    windows = WindowStore(pool)
    await keep(pool, [received(started(), 1)])
    end = window_of_id(WINDOW_ID).ends_at
    assert await windows.due(end - timedelta(seconds=1)) == []
    assert [w.window_id for w in await windows.due(end)] == [WINDOW_ID]
    asked = window_of_id("2026-11-20T10:05~60s")
    assert await windows.request_close(asked) == "open"
    [due] = await windows.due(end - timedelta(seconds=1))
    assert (due.window_id, due.close_requested, due.newest_open_start) == (asked.window_id, True, None)


async def test_quality_is_kept_by_check(pool: Pool) -> None:
    def run(
        name: str,
        *,
        call: bool = True,
        prompt: str = "?",
        answer: bool = True,
        steps: int = 1,
        said: int | None = 1,
        **more: Any,
    ) -> list[Any]:
        action = {"type": "buy", "result": 1} if answer else {"type": "buy"}
        made = {"call_id": "c", "messages": [{"role": "user", "content": prompt}], "response": reply()}
        events: list[Any] = [
            step(n, name, action=action, llm_calls=[made] if call else [], **more) for n in range(steps)
        ]
        return events if said is None else [*events, ended(name, step_count=said)]

    early, other = {"occurred_at": START - timedelta(seconds=1)}, {"policy": "other"}
    every = {"has_steps", "calls", "prompts", "consistent", "complete"}
    cases: dict[str, tuple[list[Any], set[str]]] = {
        "whole": (run("whole"), set()),
        "silent": (run("silent", call=False), {"calls"}),
        "empty prompt": (run("prompt", prompt=""), {"prompts"}),
        "without result": (run("unanswered", answer=False), set()),
        "before its start": (run("early", **early), {"consistent"}),
        "another policy": (run("other", **other), {"consistent"}),
        "missing": (run("missing", said=3), {"complete"}),
        "empty": (run("empty", steps=0, said=0), every),
        "cut": (run("cut", said=None), set()),
    }
    for number, (name, (events, broken)) in enumerate(cases.items()):
        await empty(pool)
        await keep(pool, numbered(*events, first=number * 10 + 1))
        closed = await close(pool, barrier=100)
        assert closed is not None
        assert closed["quality"] == pytest.approx(1 - len(broken) / 5), name
        checks = (await one(pool, "windows"))["quality_checks"]
        assert {check for check, share in checks.items() if share == 0} == broken, name
        assert set(checks) == every
    await empty(pool)
    await WindowStore(pool).make_windows([window_of_id(WINDOW_ID)])
    closed = await close(pool)
    assert closed is not None
    assert (closed["trajectories"], closed["quality"]) == (0, None)
    assert (await one(pool, "windows"))["quality_checks"] is None


async def test_a_run_that_contradicts_itself_across_batches_is_not_consistent(pool: Pool) -> None:
    await keep(pool, [received(step(0), 1)])
    await keep(pool, [received(ended(policy="other"), 2)])
    assert (await one(pool, "trajectories"))["consistent"] is False


async def test_late_runs_that_never_end_are_truncated(pool: Pool) -> None:
    windows = WindowStore(pool)
    await windows.make_windows([window_of_id(WINDOW_ID)])
    assert await close(pool) is not None
    await keep(pool, [received(started(), 200)])
    await windows.truncate_late(3600)
    assert (await one(pool, "trajectories"))["status"] == "open"
    await windows.truncate_late(0)
    assert (await one(pool, "trajectories"))["status"] == "truncated"
