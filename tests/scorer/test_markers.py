"""Hindsight and knowledge occur in no exported training message, whatever the judge says of them: planted markers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ratchet_sdk.events import Event, Step, uuid7_time

from services.interchange import exporting
from services.interchange.as_events import Run, encoded
from services.interchange.importing import plan
from services.interchange.reading import read_file
from shared.database import Pool
from tests.scorer.endpoint import StandIn, plain
from tests.scorer.runs import WINDOW, add_fact, add_knowledge, add_window, resolved
from tests.scorer.test_ruler import endpoint, ruler, server, three_runs

__all__ = ["endpoint", "server"]  # fixtures

AIRLINE = Path(__file__).parents[3] / "shared" / "data" / "tau-airline.jsonl.gz"
OF_WINDOW, OF_RUN, LATER, FACTS = "MARKER-OF-WINDOW", "MARKER-OF-RUN", "MARKER-LATER", "MARKER-FACTS"


async def lines_of(found: AsyncIterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in found]


def trained(group: dict[str, Any]) -> str:
    """All that a trainer would make tokens of, or condition on."""
    parts = [
        [history["messages_and_choices"], history["tools"]]
        for run in group["trajectories"]
        for history in (run, *run["additional_histories"])
    ]
    return json.dumps(parts)


def telling(scores: list[dict[str, Any]]) -> str:
    """A judge that says all that it knows."""
    words = {"explanation": f"{OF_WINDOW} {OF_RUN} {LATER}", "strengths": [FACTS], "weaknesses": [OF_WINDOW]}
    return plain([{**score, **words, "score": n / 10} for n, score in enumerate(scores)])


async def exported(pool: Pool, states: Sequence[str] = ("scored", "tie")) -> tuple[list[str], list[str]]:
    groups = await lines_of(exporting.groups(pool, WINDOW, None, states))
    talks = await lines_of(exporting.conversations(pool, WINDOW, None))
    return [trained(group) for group in groups], [json.dumps([talk["messages"], talk["tools"]]) for talk in talks]


async def test_no_marker_reaches_what_is_trained_on(pool: Pool, endpoint: StandIn) -> None:
    await three_runs(pool)
    await add_knowledge(pool, {"flaw": OF_RUN}, agent_id="a")
    await plant(pool)
    await add_fact(pool, "b", "reopened", 1.0, note=LATER)
    endpoint.always = telling
    async with ruler(pool, endpoint, judge_looks=2) as service:
        await service.window_resolved(resolved())
    for body in endpoint.bodies:
        assert all(marker in body["messages"][1]["content"] for marker in (OF_WINDOW, OF_RUN, LATER, FACTS))
    assert OF_RUN in await pool.fetchval("select max(explanation) from judgments")
    groups, talks = await exported(pool)
    assert (len(groups), len(talks)) == (1, 3)
    assert "ACME rose." in groups[0]
    assert not any("MARKER" in text for text in (*groups, *talks))


@pytest.mark.skipif(not AIRLINE.exists(), reason="the airline conversations are not beside the project")
@pytest.mark.timeout(300)
async def test_no_marker_reaches_the_airline_conversations(pool: Pool, endpoint: StandIn) -> None:
    await add_window(pool)
    await plant(pool)
    runs = plan(AIRLINE, list(read_file(AIRLINE)), "airline", datetime.now(UTC)).runs
    for number, run in enumerate(runs):
        await store_run(pool, run)
        known = {"data": {"instruction": f"{OF_RUN} {number}"}}
        await add_outcome(pool, run, "knowledge", None, known)
        fact = {"name": "thumbs", "value": -1.0, "note": f"{LATER} {number}"}
        await add_outcome(pool, run, "trajectory", -1.0, fact)
    endpoint.always = telling
    async with ruler(pool, endpoint) as service:
        await service.window_resolved(resolved())
    assert await pool.fetchval("select count(*) from groups where state = 'scored'") == 25
    assert await pool.fetchval("select count(*) from group_members where left_out is not null") == 0
    shown = [body["messages"][1]["content"] for body in endpoint.bodies]
    assert len(shown) == 25
    assert sum(text.count(OF_RUN) for text in shown) == sum(text.count(LATER) for text in shown) == 100
    groups, talks = await exported(pool)
    assert (len(groups), len(talks)) == (25, 100)
    assert not any("MARKER" in text for text in (*groups, *talks))
    messages = {json.dumps(message) for talk in talks for message in json.loads(talk)[0]}
    own = {json.dumps(message) for run in runs for step in run.steps for message in step.llm_calls[0].messages}
    assert own <= messages, "and they are whole"


async def plant(pool: Pool) -> None:
    await add_knowledge(pool, {"trend": OF_WINDOW})
    await pool.execute("update settlements set facts = $1", {"prices": {FACTS: {"first": 1}}})


async def store_run(pool: Pool, run: Run) -> None:
    """An imported run as the recorder leaves it, in the test's window."""
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                     ended_at, status, step_count, first_sequence)
           values ($1, $2, $3, $4, $5, $6, true, now(), $7, $8, 1)""",
        run.agent_id,
        run.trajectory_id,
        run.started.policy,
        WINDOW,
        run.started.scenario_id,
        run.started.started_at,
        run.ended.status,
        run.ended.step_count,
    )
    for step in run.steps:
        await store_step(pool, run, step)
    for sequence, event in enumerate([run.started, *run.steps, run.ended]):
        await store_body(pool, run, sequence, event)


async def store_step(pool: Pool, run: Run, step: Step) -> None:
    action = step.action
    await pool.execute(
        """insert into steps (agent_id, trajectory_id, step, event_id, occurred_at, action_type, answered)
           values ($1, $2, $3, $4, $5, $6, $7)""",
        run.agent_id,
        run.trajectory_id,
        step.step,
        step.event_id,
        step.occurred_at,
        action.type if action else None,
        (action.result is not None or action.error is not None) if action else None,
    )
    for call in step.llm_calls:
        await pool.execute(
            """insert into llm_calls (agent_id, trajectory_id, call_id, step, event_id, recorded, occurred_at)
               values ($1, $2, $3, $4, $5, true, $6)""",
            run.agent_id,
            run.trajectory_id,
            call.call_id,
            step.step,
            step.event_id,
            step.occurred_at,
        )


async def store_body(pool: Pool, run: Run, sequence: int, event: Event) -> None:
    sent = encoded(event)
    await pool.execute(
        """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
           values ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
        uuid7_time(event.event_id).date(),
        run.agent_id,
        event.event_id,
        run.trajectory_id,
        event.kind,  # type: ignore[attr-defined]  # each kind of event has one
        sequence,
        hashlib.sha256(sent).digest(),
        len(sent),
        zlib.compress(sent),
    )


async def add_outcome(pool: Pool, run: Run, kind: str, value: float | None, data: dict[str, Any]) -> None:
    await pool.execute(
        """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id, trajectory_id,
                                 data)
           values ('import', gen_random_uuid(), $1, now(), 1, $2, $3, $4, $5, $6)""",
        kind,
        data.get("name"),
        value,
        run.agent_id,
        run.trajectory_id,
        data,
    )
