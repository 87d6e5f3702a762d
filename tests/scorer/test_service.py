"""The scorer with the outcome judge, on a real broker and a real database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.scorer.domain import Sampling, group_id
from services.scorer.handlers import subscribe
from services.scorer.judge import Case, Judge, JudgeFailedError, Opinion, Ruling
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.ruler.ledger_store import LedgerStore
from services.scorer.service import Rules, Scorer
from services.scorer.store import Judgment, Outcome, ScorerStore
from shared.aside import Aside
from shared.bus import Bus
from shared.database import Pool
from shared.errors import RetryLaterError
from shared.events import GroupScored
from shared.trajectories import RunKey
from tests.scorer.runs import ENDS, STARTS, WINDOW, add_fact, add_run, add_window, resolved


class Kept:
    """An outbox that keeps what is announced, by message id, as the stream does."""

    def __init__(self) -> None:
        self.events: dict[str, Any] = {}
        self.away = False

    async def announce(self, event: Any) -> None:
        if self.away:
            raise RetryLaterError("the broker is away")
        assert self.events.setdefault(event.message_id, event) == event, "one message id, two contents"


def scorer(
    pool: Pool, outbox: Any, judge: Judge | None = None, others: Sequence[Judge] = (), **settings: Any
) -> Scorer:
    store = ScorerStore(pool)
    rules = Rules(**{"concurrency": 4, "rounds": 3, **settings})
    return Scorer(store, judge or OutcomeJudge(store), outbox, rules, others)


class Scripted:
    """A judge that does as it is told."""

    name = "scripted"
    model: str | None = "m1"
    rubrics: Collection[str] = ("test/1", "test/2")

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.disagreement: float | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def judge(self, case: Case) -> Ruling:
        self.asked.append(case.group_id)
        await self.gate.wait()
        if self.failure:
            raise self.failure
        opinions = {key: Opinion(n / 10, f"no. {n}") for n, key in enumerate(sorted(case.members))}
        return Ruling(opinions, case.rubric or "test/1", disagreement=self.disagreement)


async def published(bus: Bus) -> list[GroupScored]:
    info = await bus.js.stream_info("LOOP")
    data = [(await bus.js.get_msg("LOOP", n)) for n in range(1, info.state.last_seq + 1)]
    return [GroupScored.model_validate_json(m.data or b"") for m in data if m.subject == "group.scored"]


async def test_a_resolved_window_is_grouped_ranked_and_announced(pool: Pool, bus: Bus) -> None:
    await add_window(pool)
    await add_run(pool, "loser", reward=-1.0, own_reward=99.0)
    await add_run(pool, "winner", reward=2.0, own_reward=-99.0)
    await add_run(pool, "broke", status="failed", own_reward=50.0)
    await add_run(pool, "open", status="open")
    await add_run(pool, "silent", called=False, reward=1.0)
    await add_run(pool, "tardy", late=True, reward=9.0)
    await add_run(pool, "unknown")
    await add_run(pool, "forgotten", stored=False, reward=1.0)
    await add_run(pool, "holey", steps=2, reward=9.0)
    await pool.execute("delete from steps where agent_id = 'holey' and step = 0")
    await add_run(pool, "cut", status="failed", error="InternalServerError: Error code: 502", reward=1.0)
    await add_run(pool, "alone", scenario="OTHER", reward=1.0)
    await add_run(pool, "twin1", scenario="TIE", policy="posters", reward=1.0)
    await add_run(pool, "twin2", scenario="TIE", policy="posters", reward=1.0)
    await add_fact(pool, "winner", "reward", 3.0)  # a later word on the same run
    service = scorer(pool, bus)
    await bus.announce(resolved())
    subscribe(bus, service)
    await bus.broker.start()
    async with asyncio.timeout(10):
        while await pool.fetchval("select count(*) from groups where announced_at is not null") < 3:
            await asyncio.sleep(0.01)
    before = await pool.fetch("select * from judgments order by 1, 2, 3")
    await service.window_resolved(resolved())  # a redelivery
    assert await pool.fetch("select * from judgments order by 1, 2, 3") == before

    events = {event.scenario_id: event for event in await published(bus)}
    assert len(await published(bus)) == 3
    acme = events["ACME"]
    assert (acme.state, acme.judge, acme.revision, acme.spread, acme.homogeneous) == ("scored", "outcome", 1, 1.0, True)
    assert {s.agent_id: (s.score, s.rank) for s in acme.scores} == {
        "winner": (1.0, 1),
        "loser": (0.75, 2),
        "broke": (0.5, 3),
        "open": (0.0, 4),
        "holey": (0.0, 4),
    }
    assert (events["OTHER"].state, events["OTHER"].scores, events["OTHER"].revision) == ("small", [], 0)
    tie = events["TIE"]
    assert (tie.state, tie.spread, tie.policy, [s.rank for s in tie.scores]) == ("tie", 0, "posters", [1, 1])
    left_out = await pool.fetch("select agent_id, left_out from group_members where left_out is not null")
    assert {row["agent_id"]: row["left_out"].split(":")[0] for row in left_out} == {
        "silent": "no model call of it was recorded",
        "tardy": "late",
        "unknown": "no reward of record",
        "forgotten": "its events are not stored any more",
        "cut": "infrastructure broke it",
    }
    last = await pool.fetch("select agent_id, ranks_last from group_members where ranks_last is not null order by 1")
    assert [tuple(row) for row in last] == [
        ("holey", "its record has a hole: 1 of its 2 steps are stored"),
        ("open", "it never ended"),
    ]
    assert {(row["judge"], row["rubric"]) for row in before} == {("outcome", "reward-of-record/1")}
    assert {row["explanation"] for row in before} == {
        None,
        "it ranks last: it never ended",
        "it ranks last: its record has a hole: 1 of its 2 steps are stored",
    }


async def test_no_judge_is_asked_about_who_ranks_last(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "whole", scenario="one")
    await add_run(pool, "open", scenario="one", status="open")
    await add_run(pool, "open1", scenario="all", status="open")
    await add_run(pool, "open2", scenario="all", status="open")
    judge, outbox = Scripted(), Kept()
    await scorer(pool, outbox, judge).window_resolved(resolved())
    told = {event.scenario_id: event for event in outbox.events.values()}
    assert (told["one"].state, told["one"].homogeneous) == ("scored", True)
    assert {s.agent_id: (s.score, s.rank) for s in told["one"].scores} == {"whole": (1.0, 1), "open": (0.0, 2)}
    assert (told["all"].state, {s.rank for s in told["all"].scores}) == ("tie", {1})
    assert judge.asked == [told["one"].group_id]


async def test_without_a_scenario_runs_are_grouped_by_what_they_were_set_to_do(pool: Pool) -> None:
    """The recorder names the scenario of such a run after its window."""
    await add_window(pool)
    for agent, user in (("a", "ACME rose."), ("b", "ACME rose."), ("c", "IRON fell."), ("d", "IRON fell."), ("e", "?")):
        await add_run(pool, agent, scenario=WINDOW, user=user)
    await scorer(pool, Kept(), Scripted()).window_resolved(resolved())
    rows = await pool.fetch(
        """select string_agg(agent_id, '' order by agent_id) as agents, state, scenario_id like 'unnamed-%' as unnamed
             from groups join group_members using (group_id) group by group_id order by 1"""
    )
    assert [tuple(row) for row in rows] == [("ab", "scored", True), ("cd", "scored", True), ("e", "small", True)]


async def test_members_that_started_otherwise_make_a_group_unlike(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0, system="You gamble.")
    outbox = Kept()
    await scorer(pool, outbox).window_resolved(resolved())
    [event] = outbox.events.values()
    assert (event.state, event.homogeneous) == ("scored", False)


async def test_two_scorers_on_one_window_end_with_one_set(pool: Pool) -> None:
    await add_window(pool)
    for n in range(20):
        await add_run(pool, f"a{n}", reward=float(n), scenario=f"s{n % 2}")
    judge, outbox = Scripted(), Kept()
    services = [scorer(pool, outbox, judge, group_max=3, concurrency=2) for _ in range(2)]
    await asyncio.gather(*(service.window_resolved(resolved()) for service in services))
    for service in services:
        await service.announce()
    assert len(judge.asked) == len(set(judge.asked)) == 8, "each group is judged, and paid for, once"
    sizes = await pool.fetch("select count(*) from group_members group by group_id")
    assert sorted(row["count"] for row in sizes) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert await pool.fetchval("select count(*) from judgments") == 20
    assert len(outbox.events) == 8


async def test_a_failing_judge_is_a_failure_and_no_score(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    judge, outbox = Scripted(), Kept()
    judge.failure = JudgeFailedError("it said 7")
    service = scorer(pool, outbox, judge)
    await service.window_resolved(resolved())
    row = await pool.fetchrow("select state, failure, judged_at, not_before > now() as rests from groups")
    assert row is not None
    assert tuple(row) == ("failed", "it said 7", None, True)
    assert await pool.fetchval("select count(*) from judgments") == 0
    assert outbox.events == {}
    await service.judge_waiting()
    assert len(judge.asked) == 1, "it rests first"

    judge.failure = None
    await pool.execute("update groups set not_before = now()")
    await service.judge_waiting()
    row = await pool.fetchrow("select state, failure, revision from groups")
    assert row is not None
    assert tuple(row) == ("scored", None, 1)
    assert [event.state for event in outbox.events.values()] == ["scored"]


async def test_a_failing_judge_is_not_paid_for_ever(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    judge = Scripted()
    judge.failure = JudgeFailedError("away")
    service = scorer(pool, Kept(), judge, rounds=2)
    await service.window_resolved(resolved())
    for _ in range(4):
        await pool.execute("update groups set not_before = now()")
        await service.judge_waiting()
    assert len(judge.asked) == 2


async def test_what_a_killed_scorer_left_is_taken_up_by_another(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0)
    judge, outbox = Scripted(), Kept()
    judge.gate.clear()
    killed = asyncio.create_task(scorer(pool, outbox, judge).window_resolved(resolved()))
    while not judge.asked:
        await asyncio.sleep(0.01)
    killed.cancel()
    service = scorer(pool, outbox)
    await service.judge_waiting()
    assert outbox.events == {}, "its lease still runs"
    await pool.execute("update groups set not_before = now()")
    await service.judge_waiting()
    assert [event.judge for event in outbox.events.values()] == ["outcome"]


async def test_what_was_judged_and_not_announced_is_swept(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0)
    outbox = Kept()
    outbox.away = True
    service = scorer(pool, outbox)
    with pytest.raises(RetryLaterError):
        await service.window_resolved(resolved())
    assert await pool.fetchval("select state from groups where announced_at is null") == "scored"
    outbox.away = False
    await service.announce()
    await service.announce()
    assert [event.group_id for event in outbox.events.values()] == [group_id("default", WINDOW, "ACME", 0)]


async def test_a_judgment_that_stands_is_not_written_over(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0)
    service = scorer(pool, Kept())
    await service.window_resolved(resolved())
    [name] = [row["group_id"] for row in await pool.fetch("select group_id from groups")]
    late = [Judgment(("a", "t"), 1.0, 1, "bought"), Judgment(("b", "t"), 0.0, 2, "bought")]
    case = Case(name, "default", WINDOW, "ACME", STARTS, ENDS, 1, dict.fromkeys(keys_of("ab"), "completed"))
    assert not await service.store.record(case, Outcome("scored", 1.0, late, "other", None, "other/1"))
    await service.store.fail(name, "too late", 1.0)
    rows = await pool.fetch("select agent_id, score, judge from judgments order by agent_id")
    assert [tuple(row) for row in rows] == [("a", 0.0, "outcome"), ("b", 1.0, "outcome")]
    assert await pool.fetchval("select state from groups") == "scored"


async def test_a_window_without_runs_and_one_that_nobody_knows_are_no_trouble(pool: Pool) -> None:
    await add_window(pool)
    service = scorer(pool, Kept())
    await service.window_resolved(resolved())
    await service.window_resolved(resolved("2026-11-20T11:00"))
    assert await pool.fetchval("select count(*) from groups") == 0


async def test_a_reward_that_is_gone_is_a_failure_and_no_last_place(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0)
    service = scorer(pool, Kept())
    await service.form(WINDOW)
    await pool.execute("delete from outcomes where agent_id = 'b'")
    await service.judge_waiting()
    assert "a reward of record is gone" in await pool.fetchval("select failure from groups where state = 'failed'")


async def test_an_unexpected_fault_is_neither_a_score_nor_lost(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    judge = Scripted()
    judge.failure = ZeroDivisionError()
    service = scorer(pool, Kept(), judge)
    service.aside = Aside("scorer", pool)
    await service.window_resolved(resolved())
    assert await pool.fetchval("select reason from set_aside where kind = 'judge group'") == "ZeroDivisionError"
    assert await pool.fetchval("select state from groups") == "pending"


async def test_an_unexpected_fault_that_stays_ends_as_a_failure_with_its_reason(pool: Pool) -> None:
    """As the judge's own failure does: no group is left that waits and that nobody takes up again."""
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    judge = Scripted()
    judge.failure = KeyError("a bug")
    service = scorer(pool, Kept(), judge, rounds=2)
    await service.window_resolved(resolved())
    for _ in range(3):
        await pool.execute("update groups set not_before = now()")
        await service.judge_waiting()
    assert len(judge.asked) == 2
    row = await pool.fetchrow("select state, failure, judged_at from groups")
    assert row is not None
    assert tuple(row) == ("failed", "KeyError: 'a bug'", None)
    await service.measure()
    assert REGISTRY.get_sample_value("ratchet_judge_groups_failed", {"why": "KeyError"}) == 1

    judge.failure = None
    await service.rescore(WINDOW, None, None)
    await service.judge_waiting()
    assert await pool.fetchval("select state from groups") == "scored"


async def test_a_group_whose_every_scorer_died_ends_as_a_failure_too(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    service = scorer(pool, Kept(), Scripted(), rounds=2)
    await service.form(WINDOW)
    for _ in range(2):
        await pool.execute("update groups set not_before = now()")
        assert await service.store.claim(None, 60.0, 2) is not None  # who took it is killed here
    await service.judge_waiting()
    assert await pool.fetchval("select state from groups") == "pending", "the last one may still be at it"
    await pool.execute("update groups set not_before = now()")
    await service.judge_waiting()
    row = await pool.fetchrow("select state, failure from groups")
    assert row is not None
    assert tuple(row) == ("failed", "no judgment of it came to an end, in as many tries as it had")


def keys_of(agents: Sequence[str]) -> list[RunKey]:
    return [(agent, "t") for agent in agents]


async def test_the_reward_of_record_is_the_worlds_last_word(pool: Pool) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0, own_reward=5.0)
    await add_fact(pool, "a", "reward", 0.25)
    await add_fact(pool, "a", "thumbs", 9.0)
    await add_run(pool, "b", own_reward=5.0)
    assert await ScorerStore(pool).rewards(keys_of(["a", "b"])) == {("a", "t"): 0.25}


async def test_events_carry_ids_and_scores_and_no_text(pool: Pool) -> None:
    await add_window(pool)
    for agent in ("a", "b"):
        await add_run(pool, agent, said="SECRET words")
    outbox = Kept()
    await scorer(pool, outbox, Scripted()).window_resolved(resolved())
    [event] = outbox.events.values()
    assert "SECRET" not in event.model_dump_json()
    assert "no. 1" not in event.model_dump_json()
    assert set(json.loads(event.model_dump_json())["scores"][0]) == {"agent_id", "trajectory_id", "score", "rank"}
    assert await pool.fetchval("select explanation from judgments where agent_id = 'b'") == "no. 1"


# dropping, disputes, leases -----------------------------------------------------------------------
async def test_over_the_target_whole_runs_are_dropped_and_told(pool: Pool) -> None:
    await add_window(pool)
    for n in range(12):
        await add_run(pool, f"a{n}", scenario=f"s{n % 3}", reward=float(n))
    await add_run(pool, "other", policy="posters", reward=1.0)
    service = scorer(pool, Kept(), sampling=Sampling(target=8, max_rate=0.9))
    await service.window_resolved(resolved())
    rows = await pool.fetch("select left_out, count(*) from group_members group by 1 order by 2")
    assert [tuple(row) for row in rows] == [("dropped at random: 12 runs are over the target of 8", 4), (None, 9)]
    assert await pool.fetchval("select count(*) from judgments") <= 8


async def test_a_disputed_group_is_announced_without_scores(pool: Pool) -> None:
    await add_window(pool)
    for agent in "ab":
        await add_run(pool, agent)
    judge, outbox = Scripted(), Kept()
    judge.disagreement = 0.26
    service = scorer(pool, outbox, judge)
    await service.window_resolved(resolved())
    await service.judge_waiting()
    [event] = outbox.events.values()
    assert (event.state, event.scores, event.revision) == ("disputed", [], 1)
    assert len(judge.asked) == 1
    judge.disagreement = 0.25
    await service.rescore(WINDOW, None, None)
    await service.judge_waiting()
    assert [event.state for event in outbox.events.values()] == ["disputed", "scored"]


async def test_what_a_scorer_is_at_stays_its_own(pool: Pool) -> None:
    await add_window(pool)
    for agent in "ab":
        await add_run(pool, agent)
    judge = Scripted()
    judge.gate.clear()
    slow, other = scorer(pool, Kept(), judge), scorer(pool, Kept(), judge)
    judging = asyncio.create_task(slow.window_resolved(resolved()))
    while not judge.asked:
        await asyncio.sleep(0.01)
    await pool.execute("update groups set not_before = now()")
    await slow.prolong()
    await other.prolong()  # it holds nothing
    assert await other.store.claim(None, 60, 9) is None
    judge.gate.set()
    await judging
    await slow.prolong()
    assert len(judge.asked) == 1


async def test_a_claim_on_a_question_is_one_processs(pool: Pool) -> None:
    one, other = LedgerStore(pool, lease_s=60), LedgerStore(pool, lease_s=60)
    assert await one.claim(b"q")
    assert not await one.claim(b"q")
    assert not await other.claim(b"q")
    await pool.execute("update judge_claims set held_until = now() - interval '1 second'")
    await one.prolong()
    await other.prolong()
    assert not await other.claim(b"q")
    await other.release(b"q")
    assert not await other.claim(b"q")
    await pool.execute("update judge_claims set held_until = now() - interval '1 second'")
    assert await other.claim(b"q")
    await one.release(b"q")
    assert not await one.claim(b"q")


async def test_replicas_share_one_budget(pool: Pool) -> None:
    stores = [LedgerStore(pool, lease_s=60) for _ in range(3)]
    days = await asyncio.gather(*(store.reserve(100, 1000) for store in stores for _ in range(5)))
    assert sum(day is not None for day in days) == 10
    [day] = {day for day in days if day}
    await stores[0].settle(day, 100, 60, 20, 0.5)
    assert await stores[1].reserve(20, 1000)
    assert not await stores[2].reserve(1, 1000)
    names = "calls, prompt_tokens, completion_tokens, cost_usd, reserved_tokens"
    row = await pool.fetchrow(f"select {names} from judge_spend")
    assert row is not None
    assert tuple(row) == (1, 60, 20, 0.5, 920)
    assert not await stores[0].reserve(1001, 1000)
