"""Several looks at a group, what is kept of each, what it costs, and how good the judge is; on a real endpoint."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.responses import Response

from services.scorer.calibration import Calibration
from services.scorer.looks_domain import Pairs, pairs_of, tau_b
from services.scorer.looks_store import CalibrationStore, WindowPairs
from services.scorer.ruler.endpoint import retry_after_s
from shared.database import Pool
from tests.scorer.endpoint import StandIn, attempts, completion, plain, refused
from tests.scorer.runs import WINDOW, add_fact, add_knowledge, add_run, add_window, resolved
from tests.scorer.test_ruler import RIGHT, endpoint, ruler, scores, server, three_runs
from tests.scorer.test_service import Kept

__all__ = ["endpoint", "server"]  # fixtures


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def asked(endpoint: StandIn) -> list[str]:
    """What each question showed to the judge, without its delimiter."""
    found = []
    for body in endpoint.bodies:
        key = body["messages"][0]["content"].split("carry the key ")[1].split(".")[0]
        found.append(body["messages"][1]["content"].replace(key, "KEY"))
    return found


# looks --------------------------------------------------------------------------------------------
async def test_looks_differ_in_order_and_are_averaged_and_kept(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    points = {"strengths": ["calm"], "weaknesses": ["slow", "late"]}
    endpoint.script = [
        lambda scores: plain([{**score, **points} for score in scores]),
        lambda scores: plain([{**score, "score": score["score"] + 0.1} for score in scores]),
    ]
    outbox = Kept()
    prices = {"judge_prompt_usd_per_million": 2.0, "judge_completion_usd_per_million": 10.0}
    async with ruler(pool, endpoint, outbox, judge_looks=2, **prices) as service:
        await service.window_resolved(resolved())
    assert await scores(pool) == pytest.approx({"a": 0.15, "b": 0.65, "c": 0.95})
    first, second = (list(attempts(body).values()) for body in endpoint.bodies)
    assert first == second[::-1]
    [group] = await pool.fetch("select state, disagreement, spread, revision from groups")
    assert tuple(group) == ("scored", pytest.approx(0.1), pytest.approx(0.8), 1)

    rows = await pool.fetch("select * from judgment_looks order by look, place")
    assert [(row["look"], row["place"]) for row in rows] == [(n, place) for n in (0, 1) for place in (1, 2, 3)]
    assert [row["agent_id"] for row in rows[:3]] == [row["agent_id"] for row in rows[3:]][::-1]
    for row in rows:
        assert row["score"] == pytest.approx(RIGHT[row["agent_id"]] + 0.1 * row["look"])
        assert row["rank"] == {"a": 3, "b": 2, "c": 1}[row["agent_id"]]
        assert (row["judge"], row["model"], row["rubric"], row["hindsight"]) == ("ruler", "m", "ratchet/1", True)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (11, 7)
        assert row["cost_usd"] == pytest.approx((11 * 2 + 7 * 10) / 1e6)
        assert row["latency_ms"] > 0
        assert len(row["hindsight_sha256"]) == 32
        assert json.loads(row["raw_reply"])["scores"]
        assert "was weighed" in row["explanation"]
    assert (rows[0]["strengths"], rows[0]["weaknesses"]) == (["calm"], ["slow", "late"])
    assert (rows[3]["strengths"], rows[3]["weaknesses"]) == ([], [])
    assert "weighed" not in next(iter(outbox.events.values())).model_dump_json()
    about = await pool.fetch("select agent_id, count(*) from judge_cache_runs group by 1 order by 1")
    assert [tuple(row) for row in about] == [("a", 2), ("b", 2), ("c", 2)]


async def test_a_judge_that_disagrees_with_itself_gives_no_scores(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)

    def by_place(found: list[dict[str, Any]]) -> str:  # whoever stands first wins
        return plain([{**score, "score": 1.0 if n == 0 else 0.0} for n, score in enumerate(found)])

    endpoint.always = by_place
    outbox = Kept()
    last = metric("ratchet_judge_score_by_place_sum", place="last")
    first = metric("ratchet_judge_score_by_place_sum", place="first")
    seen = metric("ratchet_judge_disagreement_count")
    async with ruler(pool, endpoint, outbox, judge_looks=2) as service:
        await service.window_resolved(resolved())
    [event] = outbox.events.values()
    assert (event.state, event.scores, event.revision) == ("disputed", [], 1)
    assert await pool.fetchval("select count(*) from judgments") == 0
    assert await pool.fetchval("select disagreement from groups") == pytest.approx(2 / 3)
    assert await pool.fetchval("select count(*) from look_scores") == 6, "what it said is kept all the same"
    assert metric("ratchet_judge_score_by_place_sum", place="first") - first == pytest.approx(2.0)
    assert metric("ratchet_judge_score_by_place_sum", place="last") - last == pytest.approx(0.0)
    assert metric("ratchet_judge_disagreement_count") - seen == 1


async def test_identical_runs_are_shown_once_and_share_the_score(pool: Pool, endpoint: StandIn) -> None:
    await add_window(pool)
    for agent, said in (("a", "alpha"), ("b", "gamma"), ("c", "alpha"), ("d", "alpha")):
        await add_run(pool, agent, said=said)
    await add_fact(pool, "d", "profit", 0.625)
    async with ruler(pool, endpoint, judge_looks=2) as service:
        await service.window_resolved(resolved())
    assert [sorted(attempts(body)) for body in endpoint.bodies] == [["attempt-1", "attempt-2"]] * 2
    assert await scores(pool) == {"a": 0.1, "b": 0.9, "c": 0.1, "d": 0.1}
    assert "0.625" in asked(endpoint)[0], "what became of a copy is told of the one that stands for it"
    places = await pool.fetch("select distinct place from look_scores where agent_id in ('a', 'c', 'd') and look = 0")
    assert len(places) == 1


async def test_where_all_are_alike_nobody_is_asked(pool: Pool, endpoint: StandIn) -> None:
    await add_window(pool)
    await add_run(pool, "a")
    await add_run(pool, "b")
    async with ruler(pool, endpoint, judge_looks=2) as service:
        await service.window_resolved(resolved())
    assert endpoint.bodies == []
    assert await pool.fetchval("select state from groups") == "tie"


async def test_what_all_began_with_is_shown_once(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    async with ruler(pool, endpoint) as service:
        await service.window_resolved(resolved())
    [text] = asked(endpoint)
    assert text.count("You trade.") == text.count("ACME rose.") == text.count("make money") == 1
    shared = text.split("BEGIN shared KEY\n")[1].split("\nEND shared KEY")[0]
    assert "ACME rose." in shared
    assert all("reply" in text and "You trade." not in text for text in attempts(endpoint.bodies[0]).values())


async def test_a_run_that_timed_out_is_judged_and_comes_last(pool: Pool, endpoint: StandIn) -> None:
    await add_window(pool)
    await add_run(pool, "a", said="alpha")
    await add_run(pool, "b", said="gamma", status="truncated", steps=0)
    async with ruler(pool, endpoint) as service:
        await service.window_resolved(resolved())
    rows = await pool.fetch("select agent_id, score, rank from judgments order by rank")
    assert [tuple(row) for row in rows] == [("a", 1.0, 1), ("b", 0.0, 2)], "the judge gave it 0.9, and the other 0.1"
    assert await pool.fetchval("select score from look_scores where agent_id = 'b'") == 0.9


# what is asked ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("refuses", "form"), [(1, "json_object"), (2, None)])
async def test_a_server_without_schemas_is_asked_in_a_form_that_it_has(
    pool: Pool, endpoint: StandIn, refuses: int, form: str | None
) -> None:
    await three_runs(pool)
    endpoint.script = [lambda scores: refused(400)] * refuses
    endpoint.always = lambda scores: "```json\n" + plain(scores) + "\n```"
    async with ruler(pool, endpoint, judge_looks=2) as service:
        await service.window_resolved(resolved())
    assert await scores(pool) == pytest.approx(RIGHT)
    asked_in = [(body.get("response_format") or {}).get("type") for body in endpoint.bodies]
    assert asked_in[-2:] == [form, form], "and it is remembered"
    assert len(asked_in) == refuses + 2


async def test_a_refusal_in_every_form_is_a_failure(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    endpoint.always = lambda scores: refused(400)
    async with ruler(pool, endpoint) as service:
        await service.window_resolved(resolved())
        assert "400" in await pool.fetchval("select failure from groups")
        endpoint.always = plain
        await pool.execute("update groups set not_before = now()")
        await service.judge_waiting()
    assert endpoint.bodies[-1]["response_format"]["type"] == "json_schema", "no form was found wanting"


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert retry_after_s("7", now) == 7
    assert retry_after_s(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90
    assert retry_after_s("Fri, 20 Nov 2026 10:00:30 GMT", now) == 30
    assert retry_after_s("Fri, 20 Nov 2026 09:00:00 GMT", now) == 0
    for bad in ("", "soon", "-3", "nan", "inf"):
        assert retry_after_s(bad, now) is None


async def test_a_group_rests_as_long_as_the_endpoint_says(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    later = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    endpoint.always = lambda scores: refused(429, **{"Retry-After": later})
    async with ruler(pool, endpoint) as service:
        await service.window_resolved(resolved())
    assert len(endpoint.bodies) == 1
    assert await pool.fetchval("select not_before > now() + interval '110 minutes' from groups")


async def test_each_scenario_is_judged_by_its_rubric(pool: Pool, endpoint: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "rubrics.yaml"
    path.write_text("rubrics: [{name: mine, version: 3, text: Be kind., scenarios: ['AC*']}]")
    await three_runs(pool)
    await add_run(pool, "d", said="alpha", scenario="BOLT")
    await add_run(pool, "e", said="beta", scenario="BOLT")
    async with ruler(pool, endpoint, judge_rubrics=path, judge_rubric="art-default/1") as service:
        await service.window_resolved(resolved())
    rows = await pool.fetch("select scenario_id, rubric from judgments join groups using (group_id) group by 1, 2")
    assert {tuple(row) for row in rows} == {("ACME", "mine/3"), ("BOLT", "art-default/1")}
    assert sum("Be kind." in body["messages"][0]["content"] for body in endpoint.bodies) == 1


# paid once, within the budget ------------------------------------------------------------------------
async def test_two_replicas_with_one_question_pay_for_it_once(pool: Pool, endpoint: StandIn) -> None:
    """Both ask about the same content at the same moment, under the same group, as after a lease that ended."""
    await three_runs(pool)
    async with ruler(pool, endpoint, judge_looks=2) as one, ruler(pool, endpoint, judge_looks=2) as other:
        await one.form(WINDOW)
        case = await one.store.claim(None, 60, 9)
        assert case is not None
        rulings = await asyncio.gather(*(service.judge.judge(case) for service in (one, other, one)))
    assert len(endpoint.bodies) == 2
    assert all(dict(ruling.opinions) == dict(rulings[0].opinions) for ruling in rulings)
    paid = [look.remembered for ruling in rulings for look in ruling.looks]
    assert paid.count(False) == 2
    assert await pool.fetchval("select count(*) from judge_claims") == 0
    assert await pool.fetchval("select calls from judge_spend") == 2


async def test_a_claim_of_a_killed_scorer_ends(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    endpoint.always = lambda scores: refused(500)
    async with ruler(pool, endpoint, judge_attempts=1) as service:
        await service.window_resolved(resolved())
        assert await pool.fetchval("select count(*) from judge_claims") == 0, "a failure gives it back"
        sha256 = await _claimed_by_somebody_else(pool, endpoint)
        endpoint.always = plain
        await pool.execute("update groups set not_before = now()")
        judging = asyncio.create_task(service.judge_waiting())
        while await pool.fetchval("select attempts from groups") < 2:
            await asyncio.sleep(0.01)
        assert await scores(pool) == {}
        await pool.execute("update judge_claims set held_until = now() where content_sha256 = $1", sha256)
        await judging
    assert await scores(pool) == RIGHT


async def _claimed_by_somebody_else(pool: Pool, endpoint: StandIn) -> bytes:
    """The question that the group asks, found by asking it, then forgotten and claimed."""
    endpoint.always = plain
    async with ruler(pool, endpoint) as service:
        await pool.execute("update groups set not_before = now()")
        await service.judge_waiting()
    sha256: bytes = await pool.fetchval("delete from judge_cache returning content_sha256")
    for table in ("look_scores", "looks", "judgments"):
        await pool.execute(f"delete from {table}")
    await pool.execute("update groups set state = 'failed', revision = 0, attempts = 1")
    await pool.execute("insert into judge_claims values ($1, gen_random_uuid(), now() + interval '1 hour')", sha256)
    return sha256


async def test_a_spent_budget_makes_groups_wait_and_nothing_fails(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    await add_run(pool, "d", said="alpha", scenario="BOLT")
    await add_run(pool, "e", said="beta", scenario="BOLT")
    async with ruler(pool, endpoint, judge_looks=2, judge_tokens_per_day=3_000) as service:
        await pool.execute(
            "insert into judge_spend (day, prompt_tokens) values ((now() at time zone 'UTC')::date, 1000)"
        )
        await service.form(WINDOW)
        await pool.execute("update groups set not_before = now() + interval '1 hour' where scenario_id = 'BOLT'")
        await service.judge_waiting()
        assert endpoint.bodies == [], "a question that may not fit is not asked"
        row = await pool.fetchrow("select state, failure, attempts, waits_for from groups where scenario_id = 'ACME'")
        assert row is not None
        assert tuple(row) == ("pending", None, 0, "budget")
        await service.measure()
        assert metric("ratchet_judge_groups_waiting", reason="budget") == 1

        await pool.execute("update judge_spend set day = day - 1")  # a new day
        await pool.execute("update groups set not_before = now() where scenario_id = 'ACME'")
        await service.judge_waiting()
        assert await pool.fetchval("select state from groups where scenario_id = 'ACME'") == "scored"
        await service.measure()
        assert metric("ratchet_judge_groups_waiting", reason="budget") == 0
    row = await pool.fetchrow("select * from judge_spend order by day desc limit 1")
    assert row is not None
    assert tuple(row)[1:] == (2, 22, 14, 0.0, 0)


async def test_what_a_bad_reply_took_is_counted_too(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    endpoint.script = [
        lambda scores: plain(scores[1:]),
        lambda scores: refused(500),
        lambda scores: completion(None),
    ]
    async with ruler(pool, endpoint, judge_attempts=4, judge_tokens_per_day=100_000) as service:
        await service.window_resolved(resolved())
    row = await pool.fetchrow("select calls, prompt_tokens, completion_tokens, reserved_tokens from judge_spend")
    assert row is not None
    assert tuple(row) == (4, 33, 21, 0)


async def test_an_endpoint_that_tells_no_tokens_is_counted_at_the_most(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)

    def untold(found: list[dict[str, Any]]) -> Response:
        message = {"message": {"role": "assistant", "content": plain(found)}, "finish_reason": "stop"}
        return Response(json.dumps({"choices": [message]}), media_type="application/json")

    endpoint.always = untold
    async with ruler(pool, endpoint, judge_tokens_per_day=100_000) as service:
        await service.window_resolved(resolved())
    row = await pool.fetchrow("select prompt_tokens, completion_tokens, reserved_tokens from judge_spend")
    assert row is not None
    assert row["prompt_tokens"] > len(endpoint.bodies[0]["messages"][0]["content"]) / 5
    assert tuple(row)[1:] == (900, 0)


# calibration --------------------------------------------------------------------------------------
async def test_calibration_looks_without_hindsight_and_counts_for_no_score(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    await add_knowledge(pool, {"trend": "KNOWN-OF-WINDOW"})
    for agent, reward in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        await add_fact(pool, agent, "reward", reward)
    worse = [{"score": 0.9}, {"score": 0.5}, {"score": 0.1}]
    endpoint.script = [
        plain,
        lambda found: plain([{**s, **w} for s, w in zip(found, worse, strict=True)]),
    ]
    async with ruler(pool, endpoint, judge_calibration_rate=1) as service:
        await service.window_resolved(resolved())
    with_hindsight, without = asked(endpoint)
    assert "KNOWN-OF-WINDOW" in with_hindsight
    assert "BEGIN hindsight" not in without
    assert "KNOWN-OF-WINDOW" not in without
    assert "ACME" not in without.split("BEGIN shared")[0]
    assert '"hindsight"' not in endpoint.bodies[1]["messages"][0]["content"]
    assert await scores(pool) == RIGHT, "it counts for no score"
    blind = {row["agent_id"]: row["score"] for row in await pool.fetch("select * from look_scores where not hindsight")}
    rewards = {"a": 1.0, "b": 3.0, "c": 2.0}
    expected = pairs_of([blind[agent] for agent in "abc"], [rewards[agent] for agent in "abc"])
    rows = {row["view"]: row for row in await pool.fetch("select * from judge_calibration")}
    assert set(rows) == {"without_hindsight", "with_hindsight_circular"}
    found = rows["without_hindsight"]
    assert (found["pairs"], found["concordant"], found["discordant"]) == (3, expected.concordant, expected.discordant)
    assert found["tau_b"] == pytest.approx(tau_b(expected))
    assert rows["with_hindsight_circular"]["tau_b"] == pytest.approx(1 / 3)

    await Calibration(CalibrationStore(pool), "ruler", windows=5, drift_max=0.2).measure()
    assert metric("ratchet_judge_tau", view="without_hindsight", span="window") == pytest.approx(tau_b(expected))
    assert metric("ratchet_judge_tau", view="with_hindsight_circular", span="rolling") == pytest.approx(1 / 3)
    assert metric("ratchet_judge_tau_pairs", view="without_hindsight", span="rolling") == 3


async def test_a_calibration_that_fails_takes_no_score_along(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    endpoint.script = [plain, *[lambda scores: refused(500)] * 3]
    async with ruler(pool, endpoint, judge_calibration_rate=1) as service:
        await service.window_resolved(resolved())
    assert await scores(pool) == RIGHT
    assert await pool.fetchval("select count(*) from judge_calibration") == 0


async def test_ties_in_sql_are_those_of_the_rule(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    await add_run(pool, "d", said="alpha, but later")
    for agent, reward in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        await add_fact(pool, agent, "reward", reward)
    async with ruler(pool, endpoint, judge_calibration_rate=1) as service:
        await service.window_resolved(resolved())
    expected = pairs_of([0.1, 0.6, 0.9], [1.0, 1.0, 2.0])  # d has no reward of record
    for row in await pool.fetch("select * from judge_calibration"):
        names = ("pairs", "concordant", "discordant", "tied_by_judge", "tied_by_reward")
        assert Pairs(*(row[name] for name in names)) == expected
        assert row["tau_b"] == pytest.approx(tau_b(expected))
    await add_fact(pool, "d", "reward", 1.0)  # days later
    assert await pool.fetchval("select max(pairs) from judge_calibration") == 6
    assert await pool.fetchval("select max(tied_by_judge) from judge_calibration") == 1


class Told:
    def __init__(self, found: list[WindowPairs]) -> None:
        self.found = found

    async def newest(self, judge: str, windows: int) -> list[WindowPairs]:
        return self.found


@given(st.integers(1, 9), st.integers(1, 9))
def test_drift_is_how_far_the_newest_windows_fell_below_those_before(agreed: int, agreed_before: int) -> None:
    def of(window: str, view: str, concordant: int) -> WindowPairs:
        return WindowPairs(window, view, Pairs(10, concordant, 10 - concordant))

    found = [
        of("w4", "without_hindsight", agreed),
        of("w3", "without_hindsight", agreed),
        of("w2", "without_hindsight", agreed_before),
        of("w1", "without_hindsight", agreed_before),
        of("w4", "with_hindsight_circular", 10),
    ]
    asyncio.run(Calibration(Told(found), "ruler", windows=2, drift_max=0.2).measure())
    assert metric("ratchet_judge_tau", view="without_hindsight", span="rolling") == pytest.approx(agreed / 5 - 1)
    assert metric("ratchet_judge_tau_drift") == pytest.approx((agreed_before - agreed) / 5)
    assert metric("ratchet_judge_tau_drift_max") == 0.2
