"""Runs put straight into the database, as the recorder and the outcome tracker would have left them."""

from __future__ import annotations

import hashlib
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

from ratchet_sdk.events import (
    Action,
    LlmCall,
    Model,
    Step,
    StepEvent,
    TrajectoryEnded,
    TrajectoryStarted,
    uuid7,
    uuid7_time,
)

from services.scorer.probes.probing import planted
from shared.database import Pool
from shared.events import WindowResolved

STARTS = datetime(2026, 11, 20, 10, tzinfo=UTC)
ENDS = STARTS + timedelta(hours=1)
WINDOW = "2026-11-20T10:00"


def resolved(window_id: str = WINDOW) -> WindowResolved:
    return WindowResolved(window_id=window_id, starts_at=STARTS, ends_at=ENDS, close_revision=1, outcomes=0)


async def add_window(pool: Pool, facts: dict[str, Any] | None = None) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state, revision, closed_at)
           values ($1, $2, $3, 3600, 'closed', 1, now())""",
        WINDOW,
        STARTS,
        ENDS,
    )
    await pool.execute(
        """insert into settlements (window_id, revision, close_revision, state, facts, settled_at, announced_at)
           values ($1, 1, 1, 'settled', $2, now(), now())""",
        WINDOW,
        facts or {},
    )


def events(
    trajectory_id: str,
    *,
    system: str = "You trade.",
    user: str = "ACME rose.",
    said: str = "buy",
    own_reward: float | None = None,
    error: str | None = None,
) -> list[StepEvent]:
    """A run of one step: asked once, acted once, ended well by its own account."""
    head = {"trajectory_id": trajectory_id, "started_at": STARTS, "occurred_at": STARTS}
    call = LlmCall(
        call_id=f"{trajectory_id}-1",
        messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
        response={"message": {"role": "assistant", "content": said}, "finish_reason": "stop"},
    )
    return [
        TrajectoryStarted(**head, goal="make money", model=Model(name="default")),
        Step(
            **head,
            step=0,
            environment={"prices": {"ACME": 10}},
            llm_calls=[call],
            action=Action(type="buy", success=True, result="done"),
            reward=own_reward,
        ),
        TrajectoryEnded(
            **head,
            status="failed" if error else "completed",
            step_count=1,
            final={"own_word": own_reward},
            **({"error": error} if error else {}),
        ),
    ]


async def add_run(
    pool: Pool,
    agent_id: str,
    *,
    reward: float | None = None,
    scenario: str = "ACME",
    policy: str = "default",
    status: str = "completed",
    late: bool = False,
    called: bool = True,
    stored: bool = True,
    steps: int = 1,
    **said: Any,
) -> None:
    """One run of ``agent_id``, named ``t``, with its events, its call and the world's word on it."""
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                     ended_at, status, late, first_sequence)
           values ($1, 't', $2, $3, $4, $5, true, now(), $6, $7, 1)""",
        agent_id,
        policy,
        WINDOW,
        scenario,
        STARTS,
        status,
        late,
    )
    await pool.execute(
        """insert into llm_calls (agent_id, trajectory_id, call_id, step, event_id, recorded, occurred_at)
           values ($1, 't', 't-1', 0, $2, $3, $4)""",
        agent_id,
        uuid7(),
        called,
        STARTS,
    )
    for sequence, event in enumerate(events("t", **said) if stored else []):
        sent = event.model_dump_json(by_alias=True).encode()
        await pool.execute(
            """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
               values ($1, $2, $3, 't', $4, $5, $6, $7, $8)""",
            uuid7_time(event.event_id).date(),
            agent_id,
            event.event_id,
            event.kind,
            sequence,
            hashlib.sha256(sent).digest(),
            len(sent),
            zlib.compress(sent),
        )
    for step in range(steps):
        await pool.execute(
            """insert into steps (agent_id, trajectory_id, step, event_id, occurred_at, action_type, answered)
               values ($1, 't', $2, $3, $4, 'buy', true)""",
            agent_id,
            step,
            uuid7(),
            STARTS,
        )
    if reward is not None:
        await add_fact(pool, agent_id, "reward", reward)


async def add_fact(pool: Pool, agent_id: str, name: str, value: float, note: str | None = None) -> None:
    data = {"agent_id": agent_id, "trajectory_id": "t", "name": name, "value": value, "note": note}
    await pool.execute(
        """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id, trajectory_id,
                                 data)
           select 'market', $1, 'trajectory', $2::timestamptz + n * interval '1 microsecond', n, $3, $4, $5, 't', $6
             from (select count(*) as n from outcomes) o""",
        uuid7(),
        ENDS,
        name,
        value,
        agent_id,
        data,
    )


async def add_knowledge(pool: Pool, known: dict[str, Any], agent_id: str | None = None) -> None:
    await pool.execute(
        """insert into outcomes (source, event_id, kind, occurred_at, sequence, window_id, agent_id, trajectory_id,
                                 data)
           values ('market', $1, 'knowledge', $2, (select count(*) from outcomes), $3, $4, $5, $6)""",
        uuid7(),
        ENDS,
        None if agent_id else WINDOW,
        agent_id,
        "t" if agent_id else None,
        {"data": known},
    )


async def trust(pool: Pool, endpoint: str, model: str = "m") -> None:
    """A probe that a judge has passed just now: it is neither probed nor withheld."""
    await pool.execute(
        """insert into judge_probes (judge, model, rubric, endpoint, suite, asked_by, state, pass_mark, cases, passed,
                                     finished_at)
           values ('ruler', $1, 'ratchet/1', $2, $3, 'test', 'passed', 0.9, 1, 1, now())""",
        model,
        endpoint,
        planted().version,
    )
