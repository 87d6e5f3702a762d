"""A small world in the database: one window, two agents, one judged group, a batch, two versions, a deployment."""

from __future__ import annotations

import hashlib
import json
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

from ratchet_sdk.events import (
    Action,
    Event,
    LlmCall,
    Model,
    ProviderAccess,
    Step,
    TrajectoryEnded,
    TrajectoryStarted,
    uuid7,
)

from shared.database import Pool

START = datetime(2026, 11, 20, 10, tzinfo=UTC)
WINDOW = "2026-11-20T10:00"
HOSTILE = "</pre><script>alert('owned')</script>{{ 7*7 }}\u202e\u001b[31m"
BASE, TRAINED = "a" * 64, "b" * 64


def events(trajectory_id: str, text: str, policy: str = "default") -> list[Event]:
    """A run of two steps; its second call extends the first."""
    head: dict[str, Any] = {
        "policy": policy,
        "trajectory_id": trajectory_id,
        "started_at": START,
        "occurred_at": START + timedelta(seconds=1),
    }
    asked = [{"role": "system", "content": "Trade."}, {"role": "user", "content": text}]
    first = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "I look."}}
    act = {"id": "t1", "type": "function", "function": {"name": "buy", "arguments": '{"n": 3}'}}
    second = {
        "index": 0,
        "finish_reason": "tool_calls",
        "message": {"role": "assistant", "content": None, "tool_calls": [act]},
        "logprobs": {"content": [{"token": "buy", "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
        "token_ids": [7],
    }
    calls = [
        LlmCall(call_id="c0", messages=asked, response=first, model_version="v0", tools=[{"type": "function"}]),
        LlmCall(
            call_id="c1",
            base_call_id="c0",
            messages=[{"role": "user", "content": "Act."}],
            response=second,
            model_version="v0",
            tools=[{"type": "function"}],
        ),
    ]
    return [
        TrajectoryStarted(**head, scenario_id="ACME", goal=text, model=Model(name=policy)),
        Step(**head, step=0, llm_calls=[calls[0]], provider_accesses=[ProviderAccess(provider="feed", data=text)]),
        Step(**head, step=1, llm_calls=[calls[1]], action=Action(type="buy", parameters={"n": 3}, result=text)),
        TrajectoryEnded(**head, status="completed", step_count=2),
    ]


async def build(pool: Pool, text: str = HOSTILE) -> dict[tuple[str, str], list[bytes]]:
    """Fill every table that is shown. Returns each run's bodies as they were sent."""
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state, revision, agents, trajectories, quality,
                                closed_at)
           values ($1, $2, $3, 3600, 'closed', 1, 2, 2, 0.97, $3)""",
        WINDOW,
        START,
        START + timedelta(hours=1),
    )
    sent = {("ann", "run-1"): [], ("bob", "run-1"): [], ("bob", "run-2"): []}
    for n, (agent, run) in enumerate(sent):
        await _run(pool, agent, run, n)
        sent[agent, run] = await _bodies(pool, agent, run, events(run, text), n * 10)
    for agent, run, reward in (("ann", "run-1", 1.5), ("bob", "run-1", -0.5)):
        await _fact(pool, agent, run, reward)
    await pool.execute(
        """insert into settlements (window_id, revision, close_revision, state, outcomes)
           values ($1, 1, 1, 'settled', 2)""",
        WINDOW,
    )
    await _group(pool, text)
    await _training(pool)
    await _deployment(pool, text)
    await pool.execute("insert into seen_agents values ('ann', $1, $1, '{v0}'), ('bob', $1, $1, '{v0,v1}')", START)
    return sent


async def _run(pool: Pool, agent: str, run: str, n: int) -> None:
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                     status, step_count, model_name, model_version, first_sequence)
           values ($1, $2, 'default', $3, 'ACME', $4, true, 'completed', 2, 'default', 'v0', $5)""",
        agent,
        run,
        WINDOW,
        START,
        n * 10 + 1,
    )


async def _bodies(pool: Pool, agent: str, run: str, sent: list[Event], sequence: int) -> list[bytes]:
    bodies = [event.model_dump_json(by_alias=True).encode() for event in sent]
    for n, (event, body) in enumerate(zip(sent, bodies, strict=True), 1):
        await pool.execute(
            """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
            START.date(),
            agent,
            event.event_id,
            run,
            event.kind,  # type: ignore[attr-defined]  # every concrete event has one
            sequence + n,
            hashlib.sha256(body).digest(),
            len(body),
            zlib.compress(body),
        )
    return bodies


async def _fact(pool: Pool, agent: str, run: str, reward: float) -> None:
    await pool.execute(
        """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id,
                                 trajectory_id, data)
           values ('market', $1, 'trajectory', $2, 1, 'reward', $3, $4, $5, '{}')""",
        uuid7(),
        START,
        reward,
        agent,
        run,
    )


async def _group(pool: Pool, text: str) -> None:
    await pool.execute(
        """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state, revision, judge, spread)
           values ('g1', 'default', $1, 'ACME', true, 'scored', 1, 'outcome', 1.0),
                  ('g2', 'default', $1, 'BOLT', true, 'tie', 1, 'outcome', 0.0)""",
        WINDOW,
    )
    for agent, score, rank in (("ann", 1.0, 1), ("bob", 0.0, 2)):
        await pool.execute("insert into group_members values ('g1', $1, 'run-1')", agent)
        await pool.execute(
            """insert into judgments (group_id, revision, agent_id, trajectory_id, judge, rubric, score, rank,
                                      explanation)
               values ('g1', 1, $1, 'run-1', 'outcome', 'reward@1', $2, $3, $4)""",
            agent,
            score,
            rank,
            text,
        )


async def _training(pool: Pool) -> None:
    for sha256 in (BASE, TRAINED):
        await pool.execute(
            "insert into artifacts (sha256, uri, size_bytes, files) values ($1, 'file:///x', 9, '{}')", sha256
        )
    await pool.execute(
        """insert into batches (batch_id, policy, parent_version, method, state, lease_until, groups, trajectories)
           values ('b1', 'default', 'v0', 'grpo', 'trained', $1, 1, 2)""",
        START,
    )
    for agent, advantage in (("ann", 1.0), ("bob", -1.0)):
        await pool.execute(
            """insert into batch_trajectories (batch_id, agent_id, trajectory_id, group_id, revision, label,
                                               advantage, trained)
               values ('b1', $1, 'run-1', 'g1', 1, 'exact', $2, true)""",
            agent,
            advantage,
        )
    await pool.execute(
        """insert into models (policy, version, number, parent, batch_id, method, artifact_sha256)
           values ('default', 'v0', 0, null, null, 'base', $1), ('default', 'v1', 1, 'v0', 'b1', 'grpo', $2)""",
        BASE,
        TRAINED,
    )


async def _deployment(pool: Pool, text: str) -> None:
    await pool.execute(
        """insert into deployments (policy, version, state, share, control, reason, evidence)
           values ('default', 'v0', 'promoted', 0.7, null, 'the base', '{}'),
                  ('default', 'v1', 'canary', 0.3, 'v0', $1, '{"e": 3.2}')""",
        text,
    )
    document = {
        "policy": "default",
        "revision": 1,
        "salt": "s",
        "plans": [
            {
                "effective_from": START.isoformat(),
                "arms": [
                    {"version": "v0", "share": 0.7, "role": "best"},
                    {"version": "v1", "share": 0.3, "role": "candidate"},
                ],
            }
        ],
        "targets": {
            v: {"base_url": "http://x/v1", "model": s, "artifact_sha256": s} for v, s in (("v0", BASE), ("v1", TRAINED))
        },
    }
    await pool.execute("insert into routes values ('default', 1, $1, $2)", START, json.loads(json.dumps(document)))
    await pool.execute("insert into evidence values ('default', 'v1', 'v0', $1, 1, 1, 1.5, -0.5, 2.0)", WINDOW)
    for agent, version, reward in (("ann", "v1", 1.5), ("bob", "v0", -0.5)):
        await pool.execute(
            """insert into assignments (agent_id, trajectory_id, policy, window_id, scenario_id, version, reward,
                                        counted)
               values ($1, 'run-1', 'default', $2, 'ACME', $3, $4, $4)""",
            agent,
            WINDOW,
            version,
            reward,
        )
    await pool.execute(
        "insert into incidents (policy, version, kind, detail) values ('default', 'v1', 'endpoint', $1)", {"said": text}
    )
