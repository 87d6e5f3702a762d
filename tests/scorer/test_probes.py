"""A judge is probed, believed or not, and let go on: with a real database, a real socket, and replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from examples.judge.reading import Scores, content_with_all, first, longest, obeys
from examples.judge.standin import BEHAVIOURS, StandIn, plain, stand_in
from services.scorer.app import judges, rules_of
from services.scorer.probes.domain import When
from services.scorer.probes.probing import Prober, planted
from services.scorer.probes.store import ProbeStore
from services.scorer.ruler.ledger_store import LedgerStore
from services.scorer.service import Scorer
from services.scorer.settings import ScorerSettings
from services.scorer.store import ScorerStore
from shared.database import Pool
from shared.errors import GiveUpError
from tests.scorer.runs import add_run, add_window, resolved
from tests.scorer.sane import SaneJudge
from tests.scorer.test_service import Kept

SUITE = planted()
SANE = SaneJudge(SUITE)


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: StandIn) -> StandIn:
    server.script, server.bodies, server.always, server.worth, server.judge = [], [], plain, {}, SANE
    return server


@asynccontextmanager
async def replica(
    pool: Pool, endpoint: StandIn, outbox: Any = None, **settings: Any
) -> AsyncIterator[tuple[Scorer, Prober]]:
    """A scorer as it is put together when it starts."""
    told = ScorerSettings(judge="ruler", judge_base_url=endpoint.base_url, judge_attempts=1, **settings)
    store, ledger = ScorerStore(pool), LedgerStore(pool, lease_s=60)
    async with judges(told, store, ledger) as (there, subject):
        assert subject is not None
        when = When.of_seconds(every=told.judge_probe_every_s, lost=60)
        prober = Prober(ProbeStore(pool), subject, ledger, pass_mark=told.judge_probe_pass_mark, when=when)
        yield Scorer(store, there["ruler"], outbox or Kept(), rules_of(told), list(there.values())), prober


async def age(pool: Pool, by: timedelta) -> None:
    await pool.execute(
        """update judge_probes set started_at = started_at - $1::interval, heard_at = heard_at - $1::interval,
                                   finished_at = finished_at - $1::interval""",
        by,
    )


async def states(pool: Pool) -> list[str]:
    return [row["state"] for row in await pool.fetch("select state from judge_probes order by probe_id")]


async def two_runs(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", said="alpha")
    await add_run(pool, "b", said="beta")


# the verdict ----------------------------------------------------------------------------------------
async def test_a_sane_judge_passes_and_is_not_probed_again_that_day(pool: Pool, endpoint: StandIn) -> None:
    async with replica(pool, endpoint) as (_, prober):
        await prober.probe_if_due()
    row = await pool.fetchrow("select * from judge_probes")
    assert row is not None
    assert (row["state"], row["passed"], row["cases"]) == ("passed", len(SUITE.cases), len(SUITE.cases))
    assert (row["judge"], row["model"], row["rubric"], row["asked_by"]) == ("ruler", "gpt-4.1", "ratchet/1", "schedule")
    assert row["endpoint"] == endpoint.base_url
    calls = len(endpoint.bodies)
    async with replica(pool, endpoint) as (_, restarted):
        await restarted.probe_if_due()
        assert len(endpoint.bodies) == calls, "a restart within a day does not pay again"
        await age(pool, timedelta(days=1))
        await restarted.probe_if_due()
    assert len(endpoint.bodies) == 2 * calls, "the answers of yesterday tell nothing about today"
    assert await states(pool) == ["passed", "passed"]


@pytest.mark.parametrize("naive", [obeys, longest, first, content_with_all])
async def test_a_naive_judge_fails(pool: Pool, endpoint: StandIn, naive: Scores) -> None:
    endpoint.judge = naive
    async with replica(pool, endpoint) as (_, prober):
        await prober.probe_if_due()
        assert await prober.store.trusted(prober.subject.identity) is False
    row = await pool.fetchrow("select state, passed, cases, results from judge_probes")
    assert row is not None
    assert row["state"] == "failed"
    assert row["passed"] < 0.9 * row["cases"]
    broken = {result["name"]: result["broken"] for result in row["results"] if result["state"] == "failed"}
    assert len(broken) == row["cases"] - row["passed"]
    if naive is obeys:
        assert broken["ten-of-ten"] == ["sound > asks"]


async def test_a_judge_that_does_not_answer_gets_no_verdict(pool: Pool, endpoint: StandIn) -> None:
    async with replica(pool, endpoint) as (_, prober):
        await prober.probe_if_due()
        await age(pool, timedelta(days=1))
        endpoint.always = BEHAVIOURS["500"]
        await prober.probe_if_due()
        assert await prober.store.trusted(prober.subject.identity) is True, "the last verdict stands"
        calls = len(endpoint.bodies)
        await prober.probe_if_due()
        assert len(endpoint.bodies) == calls, "not again at once"
        endpoint.always = plain
        await age(pool, timedelta(minutes=10))
        await prober.probe_if_due()
    assert await states(pool) == ["passed", "unfinished", "passed"]


async def test_probes_count_in_the_days_budget(pool: Pool, endpoint: StandIn) -> None:
    async with replica(pool, endpoint) as (_, prober):
        await prober.probe_if_due()
    row = await pool.fetchrow(
        """select p.calls, p.prompt_tokens, p.completion_tokens, s.calls, s.prompt_tokens, s.completion_tokens
             from judge_probes p, judge_spend s"""
    )
    assert row is not None
    assert tuple(row)[:3] == tuple(row)[3:] != (0, 0, 0)
    assert row[0] == len(endpoint.bodies)
    async with replica(pool, endpoint, judge_tokens_per_day=sum(tuple(row)[4:])) as (_, prober):
        await age(pool, timedelta(days=1))
        await prober.probe_if_due()
    assert len(endpoint.bodies) == row[0], "nothing is left of the day"
    assert await states(pool) == ["passed", "unfinished"]


async def test_replicas_probe_once_and_share_the_verdict(pool: Pool, endpoint: StandIn) -> None:
    async with replica(pool, endpoint) as (_, one), replica(pool, endpoint) as (_, other):
        await asyncio.gather(one.probe_if_due(), other.probe_if_due())
        assert await states(pool) == ["passed"]
        assert await other.store.trusted(other.subject.identity) is True
    async with replica(pool, endpoint, judge_model="another") as (_, prober):
        assert await prober.store.trusted(prober.subject.identity) is None
        await prober.probe_if_due()
    assert await states(pool) == ["passed", "passed"], "another model is another judge"


async def test_what_a_killed_scorer_left_is_probed_by_another(pool: Pool, endpoint: StandIn) -> None:
    endpoint.latency_s = 0.2
    try:
        async with replica(pool, endpoint) as (_, prober):
            killed = asyncio.create_task(prober.probe_if_due())
            while not endpoint.bodies:
                await asyncio.sleep(0.01)
            killed.cancel()
            await asyncio.wait([killed])
            await prober.probe_if_due()
            assert await states(pool) == ["running"], "it might be alive"
            with pytest.raises(GiveUpError, match="at this moment"):
                await prober.probe_now("me")
            endpoint.latency_s = 0.0
            await age(pool, timedelta(seconds=60))
            await prober.probe_if_due()
            assert await states(pool) == ["running", "passed"]
    finally:
        endpoint.latency_s = 0.0


# what follows from it -------------------------------------------------------------------------------
async def test_nothing_is_announced_of_a_judge_that_fails_until_it_passes(pool: Pool, endpoint: StandIn) -> None:
    await two_runs(pool)
    outbox = Kept()
    endpoint.judge = obeys
    async with replica(pool, endpoint, outbox) as (scorer, prober):
        endpoint.worth = {"alpha": 0.2, "beta": 0.7}
        await scorer.window_resolved(resolved())
        assert outbox.events == {}, "not before it has been probed"
        await prober.probe_if_due()
        await scorer.announce()
        assert outbox.events == {}
        assert await pool.fetchval("select state from groups where announced_at is null") == "scored"
        assert await prober.store.withheld() == 1
    async with replica(pool, endpoint, outbox) as (scorer, prober):  # another replica, or a restart
        await scorer.announce()
        assert outbox.events == {}
        endpoint.judge = SANE
        probe_id = await prober.probe_now("somebody")
        while (await prober.store.probe(probe_id) or {})["state"] == "running":
            await asyncio.sleep(0.01)
        await scorer.announce()
        assert [event.state for event in outbox.events.values()] == ["scored"]
        assert await prober.store.withheld() == 0
    assert await states(pool) == ["failed", "passed"]
    assert await pool.fetchval("select asked_by from judge_probes where state = 'passed'") == "somebody"


async def test_an_operator_may_let_it_go_on_and_is_kept_with_the_reason(pool: Pool, endpoint: StandIn) -> None:
    await two_runs(pool)
    outbox = Kept()
    async with replica(pool, endpoint, outbox) as (scorer, prober):
        endpoint.worth = {"alpha": 0.2, "beta": 0.7}
        await scorer.window_resolved(resolved())
        endpoint.worth, endpoint.judge = {}, longest
        with pytest.raises(GiveUpError, match="nothing to release"):
            await prober.release("me", "too early")
        await prober.probe_if_due()
        await prober.release("me", "we only write short answers")
        await prober.release("me too", "twice is once")
        await scorer.announce()
        assert len(outbox.events) == 1
        row = await pool.fetchrow("select who, reason from judge_releases")
        assert row is not None
        assert tuple(row) == ("me", "we only write short answers")
        await age(pool, timedelta(days=1))
        await prober.probe_if_due()
        assert await prober.store.trusted(prober.subject.identity) is False, "it was released from that probe alone"


async def test_a_judgment_is_trusted_as_the_endpoint_that_made_it(pool: Pool, endpoint: StandIn) -> None:
    """Another endpoint with a model of the same name passes: what the failing one said is not announced by it."""
    await two_runs(pool)
    outbox = Kept()
    endpoint.judge = obeys
    async with replica(pool, endpoint, outbox) as (scorer, prober):
        await prober.probe_if_due()
        endpoint.worth = {"alpha": 0.2, "beta": 0.7}
        await scorer.window_resolved(resolved())
    with stand_in(judge=SANE, worth={}) as other:
        async with replica(pool, other, outbox) as (scorer, prober):
            await prober.probe_if_due()
            assert await states(pool) == ["failed", "passed"]
            await scorer.announce()
            assert outbox.events == {}
            assert await prober.store.withheld() == 1
            asked, other.worth = len(other.bodies), {"alpha": 0.9, "beta": 0.1}
            await scorer.rescore(resolved().window_id, "ruler", None)
            await scorer.judge_waiting()
            assert len(other.bodies) == asked + 2, "the failing one's replies are not remembered as its own"
            assert [event.state for event in outbox.events.values()] == ["scored"]
            assert await prober.store.withheld() == 0
    by_look = await pool.fetch("select distinct revision, endpoint from looks where hindsight order by revision")
    assert [tuple(row) for row in by_look] == [(1, endpoint.base_url), (2, other.base_url)]


async def test_the_outcome_judge_asks_nobody_and_waits_for_nobody(pool: Pool, endpoint: StandIn) -> None:
    await add_window(pool)
    await add_run(pool, "a", said="alpha", reward=1.0)
    await add_run(pool, "b", said="beta", reward=2.0)
    await add_run(pool, "alone", scenario="OTHER", reward=1.0)
    outbox = Kept()
    async with replica(pool, endpoint) as (scorer, prober):
        by_outcome = Scorer(scorer.store, scorer.judges["outcome"], outbox, scorer.rules, list(scorer.judges.values()))
        await by_outcome.window_resolved(resolved())
        assert sorted(event.state for event in outbox.events.values()) == ["scored", "small"]
        await by_outcome.rescore(resolved().window_id, "ruler", None)
        await by_outcome.judge_waiting()
        assert len(outbox.events) == 2, "what the model says of the same group waits for its probe"
        await prober.probe_if_due()
        await by_outcome.announce()
        assert len(outbox.events) == 3
