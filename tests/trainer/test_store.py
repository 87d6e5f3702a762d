"""Claiming, leases and fencing on a real Postgres."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.trainer.domain import Entry, Gate
from services.trainer.group_store import MAX_FAILED_BATCHES
from services.trainer.reading_domain import Reading
from services.trainer.store import MAX_ATTEMPTS, Lease, LeaseLostError, NewModel, Store
from shared.artifacts import Artifact
from shared.database import Pool
from shared.errors import GiveUpError
from tests.trainer.world import World


@pytest.fixture
def store(pool: Pool) -> Store:
    return Store(pool)


@pytest.fixture
async def line(store: Store, world: World, artifact: Artifact) -> World:
    """A promoted base and two scored groups."""
    await store.register_base("default", artifact, None)
    await world.deployment("v0", "promoted")
    await world.exact_groups(2)
    return world


def entries(*groups: str) -> list[Entry]:
    return [Entry(f"a{n}", f"{g}-{n}", g, 1, "exact", 1.0 - 2 * n, None) for g in groups for n in (0, 1)]


async def claim(store: Store, batch_id: str, *groups: str, parent: str = "v0", **more: Any) -> bool:
    return await store.claim(batch_id, "default", parent, "grpo", entries(*groups or ("g0",)), {}, **more)


async def expire(pool: Pool) -> None:
    await pool.execute("update batches set lease_until = now() - interval '1 second' where state = 'claimed'")


async def taken(store: Store) -> Lease:
    lease = await store.take(60)
    assert lease is not None
    return lease


def model(artifact: Artifact, number: int = 1) -> NewModel:
    return NewModel(f"v{number}", number, artifact, {"loss_first": 1.0}, None)


async def test_two_trainers_that_claim_at_once_make_one_batch(store: Store, line: World, pool: Pool) -> None:
    made = await asyncio.gather(*(claim(store, f"b{n}", "g0", "g1") for n in range(4)))
    assert sorted(made) == [False, False, False, True]
    assert await pool.fetchval("select count(*) from batches") == 1
    assert await pool.fetchval("select count(*) from batch_trajectories") == 4
    leases = await asyncio.gather(*(store.take(60) for _ in range(4)))
    [lease] = [lease for lease in leases if lease is not None]
    assert (lease.fencing_token, lease.attempts) == (1, 1)


async def test_a_line_that_has_moved_on_is_not_claimed(store: Store, line: World, artifact: Artifact) -> None:
    assert not await claim(store, "b", parent="v7")
    assert await claim(store, "b1")
    lease = await taken(store)
    assert not await claim(store, "b2", "g1")  # one is being trained
    await store.finish(lease, model(artifact), {}, {})
    assert not await claim(store, "b2", "g1")  # one is trained and not on trial
    await line.deployment("v1", "canary")
    assert await store.gates() == [Gate("default", "v0", undecided="v1")]
    assert not await claim(store, "b2", "g1")  # one is on trial
    await line.deployment("v1", "rolled_back")
    assert not await claim(store, "b2", "g0")  # a batch was made of the group
    assert await claim(store, "b2", "g1")


async def test_an_expired_lease_is_taken_over_and_the_first_holder_is_fenced(
    store: Store, line: World, artifact: Artifact, pool: Pool
) -> None:
    await claim(store, "b")
    first = await taken(store)
    assert await store.take(60) is None
    await expire(pool)
    second = await taken(store)
    assert (second.fencing_token, second.attempts) == (2, 2)
    with pytest.raises(LeaseLostError):
        await store.heartbeat(first, 60)
    with pytest.raises(LeaseLostError):
        await store.finish(first, model(artifact), {}, {})
    await store.fail(first, "too late", {("a0", "g0-0"): "never"})
    await store.release(first)
    await store.retry(first, "too late", 0, excused=True)
    assert await pool.fetchval("select count(*) from models") == 1
    await store.heartbeat(second, 60)
    await store.finish(second, model(artifact), {("a0", "g0-0"): 0.5}, {("a1", "g0-1"): "too long"})
    row = await pool.fetchrow("select state, failure, metrics from batches")
    assert tuple(row or ()) == ("trained", None, {"loss_first": 1.0})
    rows = await pool.fetch("select weight, trained, left_out from batch_trajectories order by agent_id")
    assert [tuple(row) for row in rows] == [(0.5, True, None), (1.0, False, "too long")]


async def test_a_heartbeat_keeps_a_lease(store: Store, line: World, pool: Pool) -> None:
    await claim(store, "b")
    lease = await taken(store)
    await expire(pool)
    await store.heartbeat(lease, 60)
    assert await store.take(60) is None


async def test_what_never_ends_is_given_up(store: Store, line: World, pool: Pool) -> None:
    await claim(store, "b")
    for _ in range(MAX_ATTEMPTS):
        assert await store.give_up_on_exhausted() == []
        await taken(store)
        await expire(pool)
    assert await store.take(60) is None
    assert await store.give_up_on_exhausted() == ["b"]
    assert await pool.fetchval("select failure from batches") == "given up after 3 attempts"
    assert await claim(store, "b2", "g0"), "what a failed batch held goes back"


async def test_an_orderly_stop_is_no_attempt(store: Store, line: World) -> None:
    await claim(store, "b")
    for _ in range(MAX_ATTEMPTS + 2):
        lease = await taken(store)
        assert lease.attempts == 1
        await store.release(lease)
    assert await store.give_up_on_exhausted() == []


async def barred(store: Store, group: str) -> list[str | None]:
    return [row["barred"] for row in await store.judged([group])]


async def test_a_failed_batch_gives_its_groups_back_and_the_culprit_alone_stays_out(
    store: Store, line: World, pool: Pool
) -> None:
    await claim(store, "b1", "g0", "g1")
    assert await store.unused_groups("default", 9) == []
    await store.fail(await taken(store), "nothing left", {("a1", "g0-1"): "a token id is outside the vocabulary"})
    assert [row["group_id"] for row in await store.unused_groups("default", 9)] == ["g0", "g1"]
    assert await barred(store, "g0") == [None, "a token id is outside the vocabulary"]
    assert await barred(store, "g1") == [None, None]
    failures = await store.failures("default")
    assert failures is not None
    assert (failures.in_a_row, failures.batch_id, failures.reason) == (1, "b1", "nothing left")
    row = await pool.fetchrow("select state, trained, left_out, failure from batch_overview where batch_id = 'b1'")
    assert tuple(row or ()) == ("failed", 3, {"a token id is outside the vocabulary": 1}, "nothing left")


async def test_what_fails_batch_after_batch_is_left_out_with_its_reason(
    store: Store, line: World, artifact: Artifact
) -> None:
    for number in range(MAX_FAILED_BATCHES):
        assert await barred(store, "g0") == [None, None]
        await claim(store, f"b{number}")
        await store.fail(await taken(store), "out of memory", {})
    assert await barred(store, "g0") == ["3 batches with it failed, the last: out of memory"] * 2
    assert await barred(store, "g1") == [None, None]
    await claim(store, "good", "g1")
    await store.finish(await taken(store), model(artifact), {}, {})
    assert await store.failures("default") is None


async def test_the_worlds_failures_are_not_held_against_a_run(store: Store, line: World, pool: Pool) -> None:
    for number in range(MAX_FAILED_BATCHES):
        await claim(store, f"b{number}")
        for _ in range(MAX_ATTEMPTS):
            await store.retry(await taken(store), "OSError: no space left", 0, excused=True)
        assert await store.give_up_on_exhausted() == [f"b{number}"]
    assert await barred(store, "g0") == [None, None]
    failures = await store.failures("default")
    assert failures is not None
    assert failures.in_a_row == MAX_FAILED_BATCHES


async def test_a_run_is_read_again_once_the_gateways_records_of_it_have_come(
    store: Store, line: World, pool: Pool
) -> None:
    keys = sorted(await store.unread(9))
    assert keys == [("a0", "g0-0"), ("a0", "g1-0"), ("a1", "g0-1"), ("a1", "g1-1")]
    claimed = Reading(frozenset({"v0", None}), has_tokens=True)
    await store.keep_readings(dict.fromkeys(keys, claimed))
    assert await store.unread(9) == []
    await pool.execute(
        """insert into llm_calls (agent_id, trajectory_id, call_id, step, event_id, recorded, occurred_at, witnessed)
           values ('a0', 'g0-0', 'c', 0, gen_random_uuid(), true, now(), true)"""
    )
    assert await store.unread(9) == [("a0", "g0-0")]
    await store.keep_readings({("a0", "g0-0"): replace(claimed, witnessed=True)})
    assert await store.unread(9) == []
    [row, _] = await store.judged(["g0"])
    assert (row["read"], set(row["versions"]), row["witnessed"]) == (True, {"v0", None}, True)


async def test_a_base_is_registered_once(store: Store, artifact: Artifact, pool: Pool) -> None:
    await store.register_base("default", artifact, "first")
    await store.register_base("default", artifact, "again")
    assert await pool.fetchval("select note from models") == "first"
    other = Artifact("0" * 64, "file:///x", 1, {"x": "y"})
    with pytest.raises(GiveUpError, match="already has a base"):
        await store.register_base("default", other, None)
    assert await pool.fetchval("select count(*) from artifacts") == 1
    await store.register_base("posters", other, None)


async def test_groups_are_looked_at_newest_first_and_within_the_lookback(store: Store, line: World) -> None:
    await line.exact_groups(1, prefix="new", window=5)
    await line.group("tie", [([], 0.0), ([], 0.0)], window=6, state="tie")

    async def seen(limit: int = 9, lookback: int | None = None) -> list[str]:
        return [row["group_id"] for row in await store.unused_groups("default", limit, lookback)]

    assert await seen() == ["new0", "g0", "g1"]
    assert await seen(limit=2) == ["new0", "g0"]
    assert await seen(lookback=2) == ["new0"]
    await claim(store, "b", "new0")
    assert await seen() == ["g0", "g1"]


async def judged_anew(pool: Pool, group: str, state: str = "scored") -> None:
    """What the scorer leaves of a second judgment, in which the order of the members is the other way round."""
    await pool.execute(
        """insert into judgments (group_id, revision, agent_id, trajectory_id, judge, rubric, score, rank)
           select group_id, 2, agent_id, trajectory_id, 'ruler', 'ratchet/1', 1 - score, 1
             from judgments where group_id = $1 and revision = 1 and $2 <> 'disputed'""",
        group,
        state,
    )
    await pool.execute(
        "update groups set revision = 2, wanted_revision = 2, state = $2, judge = 'ruler' where group_id = $1",
        group,
        state,
    )


async def test_what_was_trained_on_is_not_trained_on_again_by_a_new_judgment(
    store: Store, line: World, artifact: Artifact, pool: Pool
) -> None:
    await claim(store, "b1", "g0")
    await store.finish(await taken(store), model(artifact), {}, {})
    await line.deployment("v1", "rolled_back")
    await judged_anew(pool, "g0")
    await judged_anew(pool, "g1")
    [row] = await store.unused_groups("default", 9)
    assert tuple(row)[:3] == ("g1", 2, True), "one that no batch holds is trained on, by its newest judgment"
    assert sorted(row["score"] for row in await store.judged(["g1"])) == [0.0, 1.0]
    newest = [Entry(e.agent_id, e.trajectory_id, e.group_id, 2, e.label, e.advantage, None) for e in entries("g0")]
    assert not await store.claim("b2", "default", "v0", "grpo", newest, {})
    [first, second] = await store.members("b1")
    assert (first["score"], second["score"]) == (1.0, 0.0), "the batch stands on the judgment that it was made of"


async def test_a_plan_on_a_judgment_that_is_not_the_newest_is_not_claimed(
    store: Store, line: World, pool: Pool
) -> None:
    await judged_anew(pool, "g0", "disputed")
    await judged_anew(pool, "g1")
    assert not await claim(store, "b1", "g0")
    assert not await claim(store, "b1", "g1")
    newest = [Entry(e.agent_id, e.trajectory_id, e.group_id, 2, e.label, e.advantage, None) for e in entries("g1")]
    assert await store.claim("b1", "default", "v0", "grpo", newest, {})


async def test_a_group_whose_looks_disagree_is_not_trained_on(store: Store, line: World, pool: Pool) -> None:
    await judged_anew(pool, "g0", "disputed")
    assert [row["group_id"] for row in await store.unused_groups("default", 9)] == ["g1"]
