"""A window judged anew: another revision beside the older one, announced for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from services.scorer.handlers import subscribe
from services.scorer.judge import JudgeFailedError
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.store import ScorerStore
from shared.bus import Bus
from shared.database import Pool
from shared.errors import GiveUpError
from tests.scorer.runs import WINDOW, add_run, add_window, resolved
from tests.scorer.test_service import Kept, Scripted, published, scorer


async def two_groups(pool: Pool) -> None:
    await add_window(pool)
    for scenario in ("ACME", "BOLT"):
        for n, agent in enumerate(("a", "b")):
            await add_run(pool, f"{agent}-{scenario}", reward=float(-n), scenario=scenario)
    await add_run(pool, "alone", reward=1.0, scenario="OTHER")


def by_both(pool: Pool, outbox: Any) -> tuple[Any, Scripted]:
    scripted = Scripted()
    return scorer(pool, outbox, OutcomeJudge(ScorerStore(pool)), others=[scripted]), scripted


async def rows(pool: Pool, sql: str) -> list[Sequence[Any]]:
    return [tuple(row) for row in await pool.fetch(sql)]


async def test_a_new_judgment_stands_beside_the_older_one(pool: Pool) -> None:
    await two_groups(pool)
    outbox = Kept()
    service, scripted = by_both(pool, outbox)
    await service.window_resolved(resolved())
    before = await rows(pool, "select * from judgments order by 1, 2, 3")
    assert await service.rescore(WINDOW, "scripted", "test/2") == 2
    assert await rows(pool, "select distinct state, revision from groups where state <> 'small'") == [("scored", 1)], (
        "until it is judged anew the older judgment holds"
    )
    await service.judge_waiting()
    await service.judge_waiting()
    assert len(scripted.asked) == 2
    assert await rows(pool, "select * from judgments where revision = 1 order by 1, 2, 3") == before
    found = await rows(pool, "select distinct judge, model, rubric from judgments where revision = 2")
    assert found == [("scripted", "m1", "test/2")]
    events = sorted(outbox.events.values(), key=lambda event: (event.scenario_id, event.revision))
    told = [(event.scenario_id, event.revision, event.judge) for event in events]
    assert told == [
        ("ACME", 1, "outcome"),
        ("ACME", 2, "scripted"),
        ("BOLT", 1, "outcome"),
        ("BOLT", 2, "scripted"),
        ("OTHER", 0, "outcome"),
    ]
    assert [score.score for score in events[0].scores] == [1.0, 0.0]
    assert [score.score for score in events[1].scores] == [0.0, 0.1]
    await service.rescore(WINDOW, "outcome", None)
    await service.judge_waiting()
    assert await rows(pool, "select distinct revision, judge from groups where state <> 'small'") == [(3, "outcome")]


async def test_a_judge_that_fails_at_it_takes_nothing_away(pool: Pool) -> None:
    await two_groups(pool)
    outbox = Kept()
    service, scripted = by_both(pool, outbox)
    await service.window_resolved(resolved())
    scripted.failure = JudgeFailedError("it said 7")
    await service.rescore(WINDOW, "scripted", None)
    await service.judge_waiting()
    found = await rows(pool, "select distinct state, revision, failure from groups where state <> 'small'")
    assert found == [("scored", 1, "it said 7")]
    assert await pool.fetchval("select count(*) from judgments") == 4
    scripted.failure = None
    await pool.execute("update groups set not_before = now()")
    await service.judge_waiting()
    assert await rows(pool, "select distinct revision, failure from groups where state <> 'small'") == [(2, None)]


async def test_a_failed_group_can_be_judged_again_by_another(pool: Pool) -> None:
    await two_groups(pool)
    service, scripted = by_both(pool, Kept())
    service.judge = scripted
    scripted.failure = JudgeFailedError("away")
    await service.window_resolved(resolved())
    await pool.execute("update groups set attempts = 99")
    await service.rescore(WINDOW, "outcome", None)
    await service.judge_waiting()
    assert await rows(pool, "select distinct state, revision from groups where state <> 'small'") == [("scored", 1)]


async def test_what_was_asked_for_meanwhile_is_not_lost(pool: Pool) -> None:
    await two_groups(pool)
    service, scripted = by_both(pool, Kept())
    service.judge = scripted
    scripted.gate.clear()
    judging = asyncio.create_task(service.window_resolved(resolved()))
    while len(scripted.asked) < 2:
        await asyncio.sleep(0.01)
    await service.rescore(WINDOW, "outcome", None)
    scripted.gate.set()
    await judging
    await service.judge_waiting()
    assert await rows(pool, "select distinct judge from judgments") == [("outcome",)]
    assert await rows(pool, "select distinct revision from groups where state <> 'small'") == [(1,)]


@pytest.mark.parametrize(
    ("judge", "rubric", "words"),
    [("ruler", None, "RATCHET_JUDGE_BASE_URL"), ("scripted", "x/1", "it has test/1, test/2"), (None, "x/1", "outcome")],
)
async def test_what_is_not_there_cannot_be_asked_for(
    pool: Pool, judge: str | None, rubric: str | None, words: str
) -> None:
    await two_groups(pool)
    service, _ = by_both(pool, Kept())
    await service.window_resolved(resolved())
    with pytest.raises(GiveUpError, match=words):
        await service.rescore(WINDOW, judge, rubric)
    with pytest.raises(GiveUpError, match="no groups of two or more"):
        await service.rescore("2026-01-01T00:00", None, None)


async def test_it_is_asked_for_over_the_broker(pool: Pool, bus: Bus) -> None:
    await two_groups(pool)
    service, _ = by_both(pool, bus)
    subscribe(bus, service)
    await bus.broker.start()
    await service.window_resolved(resolved())
    asked = {"window_id": WINDOW, "judge": "scripted", "rubric": "test/2"}
    assert await bus.command("scorer", "rescore", asked) == {"window_id": WINDOW, "groups": 2}
    await service.judge_waiting()
    assert sorted(event.revision for event in await published(bus)) == [0, 1, 1, 2, 2]
    with pytest.raises(GiveUpError, match="wrong request"):
        await bus.command("scorer", "rescore", {"window_id": ""})
