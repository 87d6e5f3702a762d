"""Runs that are forgotten while a judge looks at them: no word about them is kept, and no judgment that had them."""

from __future__ import annotations

from services.scorer.forget_store import ForgetStore
from services.scorer.store import Judgment, ScorerStore
from shared.database import Pool
from tests.scorer.runs import WINDOW, add_run, add_window

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
    judgments = [Judgment((agent_id, "t"), 0.5, 1, "words") for agent_id in agents]
    return await ScorerStore(pool).record("g", "scored", 1.0, judgments, "ruler", "m", "r")


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
    store = ScorerStore(pool)
    await store.keep(b"before", RUNS, "ruler", "m", {"text": "words"}, 1, 1, 1.0)
    await store.keep(b"other", RUNS[:2], "ruler", "m", {"text": "words"}, 1, 1, 1.0)
    await forget(pool, "c")
    await store.keep(b"after", RUNS, "ruler", "m", {"text": "words"}, 1, 1, 1.0)
    assert [await store.cached(key) for key in (b"before", b"other", b"after")] == [None, {"text": "words"}, None]
