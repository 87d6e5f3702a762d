"""Runs that are forgotten: bodies go, tombstones stay, and nothing brings a body back."""

from __future__ import annotations

import asyncio

import pytest

from services.recorder.forget_store import GATE_LOCK, ForgetStore
from services.recorder.store import EventStore
from shared.database import Pool
from shared.errors import GiveUpError
from shared.trajectories import load
from tests.recorder.events import WINDOW_S, ended, numbered, received, started, step
from tests.recorder.rows import RUN, everything, keep, one


async def test_bodies_go_and_hashes_sizes_and_lineage_stay(pool: Pool) -> None:
    await keep(pool, [*RUN, received(started("other"), 20)])
    before = await everything(pool)
    done = await ForgetStore(pool).forget([("a", "t"), ("a", "unknown")], "ann", "a person asked")
    assert (done.runs, done.events, done.size_bytes) == (1, 4, sum(item.size_bytes for item in RUN))
    after = await everything(pool)
    assert {b["event_id"] for b in after["bodies"] if b["body"] is None} == {i.event.event_id for i in RUN}
    kept = [{k: v for k, v in row.items() if k != "body"} for row in after["bodies"]]
    assert kept == [{k: v for k, v in row.items() if k != "body"} for row in before["bodies"]]
    assert [row["action_type"] for row in after["steps"]] == [None]
    assert (after["trajectories"], after["llm_calls"]) == (before["trajectories"], before["llm_calls"])
    stone = await one(pool, "forgotten_runs")
    assert (stone["trajectory_id"], stone["who"], stone["reason"]) == ("t", "ann", "a person asked")
    assert (stone["events"], stone["size_bytes"]) == (done.events, done.size_bytes)
    assert list(await load(pool, [("a", "t"), ("a", "other")])) == [("a", "other")]


async def test_twice_is_once_and_the_first_tombstone_stays(pool: Pool) -> None:
    await keep(pool, RUN)
    store = ForgetStore(pool)
    await store.forget([("a", "t")], "ann", None)
    first = await one(pool, "forgotten_runs")
    again = await store.forget([("a", "t")], "bob", "again")
    assert (again.runs, again.events, again.size_bytes) == (0, 0, 0)
    assert await one(pool, "forgotten_runs") == first


async def test_what_comes_again_or_anew_brings_no_body_back(pool: Pool) -> None:
    await keep(pool, RUN[:3])
    await ForgetStore(pool).forget([("a", "t")], "ann", None)
    new = received(step(1, action={"type": "tell a secret"}), 30)
    assert await keep(pool, [*RUN, new]) == {}  # the first three again, the end and a step for the first time
    bodies = await pool.fetch("select event_id, body, size_bytes from bodies")
    assert len(bodies) == 5
    assert {row["body"] for row in bodies} == {None}
    assert next(row for row in bodies if row["event_id"] == new.event.event_id)["size_bytes"] == new.size_bytes
    assert [row["action_type"] for row in await pool.fetch("select action_type from steps")] == [None, None]
    assert (await one(pool, "trajectories"))["status"] == "completed"
    assert await load(pool, [("a", "t")]) == {}


async def test_a_conflict_of_a_forgotten_run_leaves_no_dead_letter(pool: Pool) -> None:
    await keep(pool, [*numbered(step(0, "t"), step(0, "u"))])
    await ForgetStore(pool).forget([("a", "t")], "ann", None)
    dead = await keep(pool, numbered(step(0, "t", reward=9), step(0, "u", reward=9), first=10))
    assert list(dead) == [11]


async def test_a_batch_that_is_being_stored_is_waited_for(pool: Pool) -> None:
    """Its transaction began before the run was forgotten: its bodies are erased with the rest."""
    await keep(pool, RUN[:1])
    async with pool.acquire() as connection, connection.transaction():
        await EventStore(pool)._keep(connection, [received(ended(), 40)], WINDOW_S)
        forgetting = asyncio.create_task(ForgetStore(pool).forget([("a", "t")], "ann", None))
        while not await pool.fetchval(
            "select count(*) from pg_locks where not granted and locktype = 'advisory' and objid::bigint = $1",
            GATE_LOCK % 2**32,
        ):
            await asyncio.sleep(0.01)
        assert not forgetting.done()
    assert (await forgetting).events == 2
    assert await pool.fetchval("select count(*) from bodies where body is not null") == 0


async def test_only_our_own_tables_are_rewritten(pool: Pool) -> None:
    store = ForgetStore(pool)
    await store.rewrite("bodies_default")
    await store.rewrite("steps")
    for name in ("outcomes", "bodies", "steps; drop table steps", ""):
        with pytest.raises(GiveUpError):
            await store.rewrite(name)
