"""What becomes of a group when the judge's endpoint misbehaves: scored rightly, or tried, failed and never a score."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from examples.judge.standin import BEHAVIOURS, StandIn, plain, stand_in
from examples.judge.wire import as_json
from services.scorer.ruler.endpoint import ask_of
from services.scorer.ruler.judge import RulerJudge
from services.scorer.ruler.ledger_store import LedgerStore
from services.scorer.ruler.streamed import joined
from services.scorer.service import Rules, Scorer
from services.scorer.settings import ScorerSettings
from services.scorer.store import ScorerStore
from shared.database import Pool
from tests.scorer.runs import add_run, add_window, resolved
from tests.scorer.test_service import Kept

ATTEMPTS = 3
HARMLESS = {"straight", "permuted", "stream"}
RIGHT = {"a": 0.1, "b": 0.6, "c": 0.9}


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: StandIn) -> StandIn:
    server.script, server.bodies, server.always, server.stream_only = [], [], plain, False
    server.worth = {"alpha": 0.1, "beta": 0.6, "gamma": 0.9}
    return server


@asynccontextmanager
async def ruler(pool: Pool, endpoint: StandIn, outbox: Kept, timeout_s: float = 30) -> AsyncIterator[Scorer]:
    told = ScorerSettings(
        judge="ruler",
        judge_base_url=endpoint.base_url,
        judge_attempts=ATTEMPTS,
        judge_looks=2,
        judge_calibration_rate=0,
        judge_timeout_s=timeout_s,
    )
    store = ScorerStore(pool)
    async with ask_of(told) as ask:
        judge = RulerJudge(store, ask, told, ledger=LedgerStore(pool, lease_s=60), first_pause_s=0.001)
        yield Scorer(store, judge, outbox, Rules(rounds=9))


async def three_runs(pool: Pool) -> None:
    await add_window(pool)
    for agent, said in (("a", "alpha"), ("b", "beta"), ("c", "gamma")):
        await add_run(pool, agent, said=said)


async def scores(pool: Pool) -> dict[str, float]:
    return {row["agent_id"]: row["score"] for row in await pool.fetch("select agent_id, score from judgments")}


@pytest.mark.parametrize("name", sorted(BEHAVIOURS))
async def test_a_group_is_scored_rightly_or_not_at_all(pool: Pool, endpoint: StandIn, name: str) -> None:
    await three_runs(pool)
    outbox = Kept()
    endpoint.always = BEHAVIOURS[name]
    patience_s = 0.5 if name == "hang" else 30
    async with ruler(pool, endpoint, outbox, patience_s) as scorer:
        await scorer.window_resolved(resolved())
        row = await pool.fetchrow("select state, failure from groups")
        assert row is not None
        if name in HARMLESS:
            assert (row["state"], await scores(pool)) == ("scored", RIGHT)
            assert len(endpoint.bodies) == 2, "once for each look"
            return
        assert row["state"] == "failed"
        assert "judge" in row["failure"]
        assert await scores(pool) == {}
        assert outbox.events == {}
        assert len(endpoint.bodies) == ATTEMPTS
        assert await pool.fetchval("select count(*) from judge_cache") == 0, "what could not be read is not remembered"

        endpoint.always, endpoint.script = plain, [BEHAVIOURS[name]]  # it gets over it: the group is judged again
        await pool.execute("update groups set not_before = now()")
        await scorer.judge_waiting()
        assert await scores(pool) == RIGHT
        assert [event.state for event in outbox.events.values()] == ["scored"]


async def test_a_content_filter_is_told_as_one(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    filtered = {
        "error": {"code": "content_filter", "message": "The response was filtered due to the prompt", "status": 400}
    }
    endpoint.always = lambda scores: as_json(filtered, 400)
    async with ruler(pool, endpoint, Kept()) as scorer:
        await scorer.window_resolved(resolved())
        assert len(endpoint.bodies) == 1, "another form of answer would meet the same filter"
        failure = await pool.fetchval("select failure from groups")
        assert failure.startswith("the content filter of the judge's endpoint refused the question (400)")
        await scorer.measure()
        assert REGISTRY.get_sample_value("ratchet_judge_groups_failed", {"why": failure.partition(" (call ")[0]}) == 1

        endpoint.always = BEHAVIOURS["content filter"]
        await pool.execute("update groups set not_before = now()")
        await scorer.judge_waiting()
        failure = await pool.fetchval("select failure from groups")
        assert failure.startswith("the content filter of the judge's endpoint cut its answer off")


async def test_a_server_that_refuses_all_but_streams_is_asked_for_streams(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    endpoint.stream_only = True
    async with ruler(pool, endpoint, Kept()) as scorer:
        await scorer.window_resolved(resolved())
    assert await scores(pool) == RIGHT
    assert [body.get("stream", False) for body in endpoint.bodies] == [False, True, True], "it is refused once"
    row = await pool.fetchrow("select prompt_tokens, completion_tokens from judge_cache limit 1")
    assert row is not None
    assert min(row) > 0, "what it cost is told at the end of a stream"


def chunk(text: str | None, finish: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


def test_a_stream_that_ends_without_done_is_whole_and_a_null_is_nothing() -> None:
    opening = 'data: {"choices": null, "error": null}\n\n'
    whole = joined((opening + chunk("a\u2028b", error=None) + chunk("!", "stop")).rstrip().encode())
    assert whole["choices"][0]["message"]["content"] == "a\u2028b!"


def test_a_stream_is_put_together() -> None:
    whole = joined((": ping\n\n" + chunk("ä") + chunk("b\n") + chunk(None, "stop") + "data: [DONE]\n\n").encode())
    assert whole["choices"][0]["message"]["content"] == "äb\n"
    assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (chunk("half"), "broke off"),
        ("", "broke off"),
        (chunk("half") + 'data: {"error": {"message": "away"}}\n\n', "error"),
        ("data: [1]\n\n", "no object"),
        ('data: {"choices": [1]}\n\n', "no list of objects"),
        ("data: {\n\n", "not JSON"),
    ],
)
def test_a_stream_that_is_no_completion_is_refused(content: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        joined(content.encode())
