"""Runs that are forgotten while a judge looks at them: no word about them is kept, and no judgment that had them."""

from __future__ import annotations

from services.scorer.forget_store import ForgetStore
from services.scorer.judge import Case
from services.scorer.ruler.ledger_store import LedgerStore, Reply
from services.scorer.store import Judgment, Outcome, ScorerStore
from shared.database import Pool
from tests.scorer.runs import ENDS, STARTS, WINDOW, add_run, add_window

RUNS = [(agent_id, "t") for agent_id in ("a", "b", "c")]


async def waiting_group(pool: Pool) -> None:
    await add_window(pool)
    await pool.execute(
        """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state, not_before, attempts)
           values ('g', 'default', $1, 'ACME', true, 'pending', now() + interval '1 hour', 5)""",
        WINDOW,
    )
    for agent_id, _ in RUNS:
        await add_run(pool, agent_id)
        await pool.execute("insert into group_members values ('g', $1, 't')", agent_id)


async def forget(pool: Pool, agent_id: str) -> None:
    await pool.execute("insert into forgotten_runs values ($1, 't', now(), 'ann')", agent_id)
    await ForgetStore(pool).forget([(agent_id, "t")], "ruler")


async def record(pool: Pool, *agents: str) -> bool:
    members = dict.fromkeys([(agent_id, "t") for agent_id in agents], "completed")
    attempts = await pool.fetchval("select attempts from groups")
    case = Case("g", "default", WINDOW, "ACME", STARTS, ENDS, attempts, members)
    judgments = [Judgment(key, 0.5, 1, "words") for key in members]
    return await ScorerStore(pool).record(case, Outcome("scored", 1.0, judgments, "ruler", "m", "r"))


async def test_a_judgment_that_had_the_run_is_refused_and_the_rest_is_judged_anew(pool: Pool) -> None:
    await waiting_group(pool)
    await forget(pool, "c")
    assert not await record(pool, "a", "b", "c")
    case = await ScorerStore(pool).claim(WINDOW, 60, 3)
    assert case is not None
    assert set(case.members) == {("a", "t"), ("b", "t")}
    assert await record(pool, "a", "b")


async def test_a_reply_about_a_forgotten_run_is_not_remembered(pool: Pool) -> None:
    await waiting_group(pool)
    store, reply = LedgerStore(pool, lease_s=60), Reply("words", 1, 1, None, 1.0)
    await store.keep(b"before", "ruler", "m", reply, RUNS)
    await store.keep(b"other", "ruler", "m", reply, RUNS[:2])
    await forget(pool, "c")
    await store.keep(b"after", "ruler", "m", reply, RUNS)
    assert [await store.remembered(key, RUNS[:2]) for key in (b"before", b"other", b"after")] == [None, reply, None]


async def test_a_window_is_judged_again_without_those_that_were_forgotten(pool: Pool) -> None:
    await waiting_group(pool)
    store = ScorerStore(pool)
    assert await record(pool, "a", "b", "c")
    await forget(pool, "c")
    assert await store.want(WINDOW, "ruler", None) == 1
    case = await store.claim(WINDOW, 60, 3)
    assert case is not None
    assert set(case.members) == {("a", "t"), ("b", "t")}
    await forget(pool, "b")
    assert await pool.fetchval("select (state, revision, wanted)::text from groups") == "(scored,1,f)"
    assert await store.want(WINDOW, "ruler", None) == 0
